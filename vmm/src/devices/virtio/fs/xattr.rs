//! Extended attributes: those that containers need, under names that need no rights on the host.
//!
//! The guest's `trusted.X` is `user.isopod.trusted.X` here: setting the real one takes
//! `CAP_SYS_ADMIN` on the host, and every container's overlayfs wants it. The guest cannot reach the
//! reserved names in any other way. Linux has `user.` attributes for regular files and directories
//! only, which is enough for overlayfs: it marks directories and regular files, its whiteouts are
//! devices, and it goes on when a link or a special file cannot be marked (`EPERM`).

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::AsFd;

use super::files::Files;
use super::host::{done, error, path_of};
use super::stat::Stat;

/// `XATTR_SIZE_MAX` and `XATTR_LIST_MAX` (include/uapi/linux/limits.h).
pub(super) const XATTR_MAX: u32 = 65536;

const TRUSTED: &[u8] = b"trusted.";

/// Beginning of the names that are the VMM's own.
const RESERVED: &[u8] = b"user.isopod.";

/// Beginning of the guest's trusted attributes on the host.
const RESERVED_TRUSTED: &[u8] = b"user.isopod.trusted.";

/// An answer of variable length: what was asked for, or how long it is.
pub(super) enum Sized {
    Value(Vec<u8>),
    Length(u32),
}

/// The host's name for an attribute of the guest's.
///
/// # Errors
///
/// `EOPNOTSUPP` for kinds of attributes that are not served.
fn host_name(name: &CStr) -> io::Result<CString> {
    let bytes = name.to_bytes();
    if let Some(rest) = bytes.strip_prefix(TRUSTED) {
        return Ok(CString::new([RESERVED_TRUSTED, rest].concat())?);
    }
    if bytes.starts_with(RESERVED) || !is_served(bytes) {
        return Err(error(libc::EOPNOTSUPP));
    }
    Ok(name.to_owned())
}

fn is_served(name: &[u8]) -> bool {
    name.starts_with(b"user.")
        || matches!(
            name,
            b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default"
        )
}

/// The guest's name for an attribute of the host's, if it is to know of it.
fn guest_name(name: &[u8], sees_trusted: bool) -> Option<Vec<u8>> {
    if let Some(rest) = name.strip_prefix(RESERVED_TRUSTED) {
        return sees_trusted.then(|| [TRUSTED, rest].concat());
    }
    (!name.starts_with(RESERVED) && is_served(name)).then(|| name.to_vec())
}

impl Files {
    /// The path of a node's file on the host. The calls that take a descriptor want one that is open
    /// for reading.
    fn path_of_node(&self, id: u64, change: bool) -> io::Result<Path> {
        let node = self.nodes.find(id)?;
        node.refuse_traced()?;
        let file = self.file(&node)?;
        if change {
            self.refuse_gone(&node, &Stat::of(file.as_fd())?)?;
        }
        Ok(Path { path: path_of(file.as_fd()), _file: file })
    }

    pub(super) fn set_attribute(
        &self,
        id: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        let name = host_name(name)?;
        let file = self.path_of_node(id, true)?;
        let (path, name, flags) = (file.path.as_ptr(), name.as_ptr(), flags as libc::c_int);
        // SAFETY: path and name are C strings, and the kernel reads the value's bytes only.
        done(unsafe { libc::setxattr(path, name, value.as_ptr().cast(), value.len(), flags) })
    }

    pub(super) fn attribute(&self, id: u64, name: &CStr, size: u32) -> io::Result<Sized> {
        if size > XATTR_MAX {
            return Err(error(libc::E2BIG));
        }
        let name = host_name(name)?;
        let file = self.path_of_node(id, false)?;
        let mut value = vec![0u8; size as usize];
        let (path, name, room) = (file.path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast());
        // SAFETY: path and name are C strings, and the kernel writes at most the length given.
        let len = length(unsafe { libc::getxattr(path, name, room, value.len()) })?;
        if size == 0 {
            return Ok(Sized::Length(len as u32));
        }
        value.truncate(len);
        Ok(Sized::Value(value))
    }

    /// Lists the names, `trusted.` ones for the superuser only, as Linux does.
    pub(super) fn attribute_names(&self, id: u64, size: u32, uid: u32) -> io::Result<Sized> {
        if size > XATTR_MAX {
            return Err(error(libc::E2BIG));
        }
        let file = self.path_of_node(id, false)?;
        let mut names = vec![0u8; XATTR_MAX as usize];
        let (path, room) = (file.path.as_ptr(), names.as_mut_ptr().cast());
        // SAFETY: the path is a C string, and the kernel writes at most the length given.
        let len = length(unsafe { libc::listxattr(path, room, names.len()) })?;
        names.truncate(len);
        let mut list = Vec::new();
        for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            if let Some(name) = guest_name(name, uid == 0) {
                list.extend(name);
                list.push(0);
            }
        }
        match size {
            0 => Ok(Sized::Length(list.len() as u32)),
            size if list.len() > size as usize => Err(error(libc::ERANGE)),
            _ => Ok(Sized::Value(list)),
        }
    }

    pub(super) fn remove_attribute(&self, id: u64, name: &CStr) -> io::Result<()> {
        let name = host_name(name)?;
        let file = self.path_of_node(id, true)?;
        // SAFETY: path and name are C strings, and the call keeps none of its arguments.
        done(unsafe { libc::removexattr(file.path.as_ptr(), name.as_ptr()) })
    }
}

/// A path that holds while the descriptor in it is open.
struct Path {
    path: CString,
    _file: std::sync::Arc<super::descriptor::Descriptor>,
}

fn length(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_reserved_are_neither_seen_nor_reached() {
        let host = |name: &CStr| host_name(name).map(CString::into_bytes).ok();
        assert_eq!(host(c"user.x").as_deref(), Some(&b"user.x"[..]));
        assert_eq!(host(c"trusted.overlay.opaque").unwrap(), b"user.isopod.trusted.overlay.opaque");
        for name in [c"user.isopod.trusted.x", c"user.isopod.x", c"security.selinux", c"system.x"] {
            assert_eq!(host(name), None, "{name:?}");
        }
        let guest = |name: &[u8]| guest_name(name, true);
        assert_eq!(
            guest(b"user.isopod.trusted.overlay.opaque").unwrap(),
            b"trusted.overlay.opaque"
        );
        for name in [&b"trusted.overlay.opaque"[..], b"user.isopod.x", b"security.selinux"] {
            assert_eq!(guest(name), None);
        }
        assert_eq!(guest_name(b"user.isopod.trusted.x", false), None);
    }
}

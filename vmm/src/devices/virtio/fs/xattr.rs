//! Extended attributes: only those that containers need, under names that need no rights on the
//! host.
//!
//! The guest's `trusted.X` is `user.isopod.trusted.X` on the host. Every container's overlayfs
//! needs `trusted.` attributes, and the real ones require `CAP_SYS_ADMIN` on the host. The guest
//! cannot reach the reserved names otherwise.
//!
//! Linux has `user.` attributes for regular files and directories only. That is enough for
//! overlayfs: it marks directories and regular files, and its whiteouts are devices. It continues
//! if a link or a special file cannot be marked (`EPERM`).

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::AsFd;

use super::files::Files;
use super::host::{done, error, path_of};
use super::stat::Stat;

/// `XATTR_SIZE_MAX` and `XATTR_LIST_MAX` (include/uapi/linux/limits.h).
pub(super) const XATTR_MAX: u32 = 65536;

const TRUSTED: &[u8] = b"trusted.";

/// Prefix of names that are reserved for the VMM.
const RESERVED: &[u8] = b"user.isopod.";

/// Prefix of the guest's trusted attributes on the host.
const RESERVED_TRUSTED: &[u8] = b"user.isopod.trusted.";

/// An answer of variable length: a value, or only its length.
pub(super) enum XattrReply {
    Value(Vec<u8>),
    Length(u32),
}

/// Returns the host's name of a guest's attribute. `EOPNOTSUPP` for attributes that are not served.
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

/// Returns the guest's name of a host's attribute, if the guest may see it.
fn guest_name(name: &[u8], sees_trusted: bool) -> Option<Vec<u8>> {
    if let Some(rest) = name.strip_prefix(RESERVED_TRUSTED) {
        return sees_trusted.then(|| [TRUSTED, rest].concat());
    }
    (!name.starts_with(RESERVED) && is_served(name)).then(|| name.to_vec())
}

impl Files {
    /// Returns the path of a node's file on the host. The calls for descriptors need one open for
    /// reading.
    fn path_of_node(&self, id: u64, change: bool) -> io::Result<XattrPath> {
        let node = self.nodes.find(id)?;
        node.refuse_traced()?;
        let file = self.file(&node)?;
        if change {
            self.refuse_gone(&node, &Stat::of(file.as_fd())?)?;
        }
        Ok(XattrPath { path: path_of(file.as_fd()), _file: file })
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

    pub(super) fn attribute(&self, id: u64, name: &CStr, size: u32) -> io::Result<XattrReply> {
        if size > XATTR_MAX {
            return Err(error(libc::E2BIG));
        }
        let name = host_name(name)?;
        let file = self.path_of_node(id, false)?;
        let mut value = vec![0u8; size as usize];
        let (path, name, room) = (file.path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast());
        // SAFETY: path and name are C strings, and the kernel writes at most the given length.
        let len = length(unsafe { libc::getxattr(path, name, room, value.len()) })?;
        if size == 0 {
            return Ok(XattrReply::Length(len as u32));
        }
        value.truncate(len);
        Ok(XattrReply::Value(value))
    }

    /// Lists the names. Names with `trusted.` are for the superuser only, as in Linux.
    pub(super) fn attribute_names(&self, id: u64, size: u32, uid: u32) -> io::Result<XattrReply> {
        if size > XATTR_MAX {
            return Err(error(libc::E2BIG));
        }
        let file = self.path_of_node(id, false)?;
        let mut names = vec![0u8; XATTR_MAX as usize];
        let (path, room) = (file.path.as_ptr(), names.as_mut_ptr().cast());
        // SAFETY: the path is a C string, and the kernel writes at most the given length.
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
            0 => Ok(XattrReply::Length(list.len() as u32)),
            size if list.len() > size as usize => Err(error(libc::ERANGE)),
            _ => Ok(XattrReply::Value(list)),
        }
    }

    pub(super) fn remove_attribute(&self, id: u64, name: &CStr) -> io::Result<()> {
        let name = host_name(name)?;
        let file = self.path_of_node(id, true)?;
        // SAFETY: path and name are C strings, and the call keeps none of its arguments.
        done(unsafe { libc::removexattr(file.path.as_ptr(), name.as_ptr()) })
    }
}

/// A path that is valid while the descriptor in it is open.
struct XattrPath {
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

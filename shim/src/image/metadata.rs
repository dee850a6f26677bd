//! Owner, permissions, times and extended attributes of a layer's entry.

use std::{
    ffi::CStr,
    os::fd::AsRawFd,
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::{
    fd::OwnedFd,
    fs::{
        AtFlags, Gid, Mode, Timestamps, Uid, XattrFlags, chmodat, chownat, fchmod, fchown,
        flistxattr, fremovexattr, fsetxattr, futimens, lsetxattr, utimensat,
    },
    io::Errno,
};

use crate::{
    error::{Explain, Result},
    image::archive::{Entry, Kind},
    text::quoted,
};

/// Attributes that belong to a host and not to an image: those of security modules, integrity
/// measurement, access control lists of NFS, and overlayfs.
const HOST_ONLY: [&[u8]; 5] = [
    b"security.selinux",
    b"security.ima",
    b"security.evm",
    b"system.nfs4_acl",
    b"trusted.overlay.",
];

/// Set once the missing-xattr warning has been logged.
static WARNED: AtomicBool = AtomicBool::new(false);

/// The attribute whose absence changes the rights of a program.
const NEEDED: &[u8] = b"security.capability";

/// Sets the metadata of an open file or directory. The owner comes first, because a change of owner
/// clears set-id bits and capabilities (chown(2)).
pub(super) fn set(file: &OwnedFd, entry: &Entry) -> Result<()> {
    let (uid, gid) = owner(entry);
    fchown(file, Some(uid), Some(gid)).explain(|| "cannot set its owner".into())?;
    fchmod(file, Mode::from_raw_mode(entry.mode)).explain(|| "cannot set its mode".into())?;
    for (name, value) in wanted(entry) {
        result(name, fsetxattr(file, name, value, XattrFlags::empty()), entry)?;
    }
    futimens(file, &timestamps(entry)).explain(|| "cannot set its time".into())
}

/// Sets the metadata of a file whose opening would have an effect: a link, a pipe or a device.
/// `name` was made a moment ago, and is no symbolic link unless the entry is one.
pub(super) fn set_at(directory: &OwnedFd, name: &CStr, entry: &Entry) -> Result<()> {
    let (uid, gid) = owner(entry);
    chownat(directory, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
        .explain(|| "cannot set its owner".into())?;
    if entry.kind != Kind::Symlink {
        let mode = Mode::from_raw_mode(entry.mode);
        chmodat(directory, name, mode, AtFlags::empty())
            .explain(|| "cannot set its mode".into())?;
    }
    let mut path = format!("/proc/self/fd/{}/", directory.as_raw_fd()).into_bytes();
    path.extend_from_slice(name.to_bytes());
    for (name, value) in wanted(entry) {
        result(name, lsetxattr(&*path, name, value, XattrFlags::empty()), entry)?;
    }
    utimensat(directory, name, &timestamps(entry), AtFlags::SYMLINK_NOFOLLOW)
        .explain(|| "cannot set its time".into())
}

/// Removes the attributes that lower layers have given to a directory.
pub(super) fn clear_xattrs(directory: &OwnedFd) -> Result<()> {
    let mut names = vec![0; 64 << 10];
    let length = match flistxattr(directory, &mut names[..]) {
        Ok(length) => length,
        Err(Errno::NOTSUP) => return Ok(()),
        Err(error) => return Err(error).explain(|| "cannot list its attributes".into()),
    };
    for name in names[..length].split(|byte| *byte == 0) {
        if name.is_empty() || is_host_only(name) {
            continue;
        }
        match fremovexattr(directory, name) {
            Ok(()) | Err(Errno::NODATA) => {}
            Err(error) => {
                return Err(error).explain(|| format!("cannot remove its {}", quoted(name)));
            }
        }
    }
    Ok(())
}

fn owner(entry: &Entry) -> (Uid, Gid) {
    (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid))
}

/// The times of an entry. Layers carry no access time, so the modification time stands for it.
fn timestamps(entry: &Entry) -> Timestamps {
    Timestamps { last_access: entry.mtime, last_modification: entry.mtime }
}

fn wanted(entry: &Entry) -> impl Iterator<Item = (&[u8], &[u8])> {
    entry.xattrs.iter().filter_map(|(name, value)| {
        if is_host_only(name) {
            log::debug!("{}: {} is left out", quoted(&entry.path), quoted(name));
            return None;
        }
        Some((&**name, &**value))
    })
}

fn is_host_only(name: &[u8]) -> bool {
    HOST_ONLY.iter().any(|host_only| {
        name == *host_only || (host_only.ends_with(b".") && name.starts_with(host_only))
    })
}

/// The result of setting an attribute. If the file system lacks this kind of attribute, the file
/// goes without it, as with engines. Without [`NEEDED`] a program may not work, so its lack is an
/// error.
fn result(name: &[u8], result: rustix::io::Result<()>, entry: &Entry) -> Result<()> {
    match result {
        Err(Errno::NOTSUP) if name != NEEDED => {
            let message = format!(
                "{}: the file system here has no attributes such as {}; it goes without",
                quoted(&entry.path),
                quoted(name)
            );
            // One file without attributes may mean thousands, so the warning comes once.
            if WARNED.swap(true, Ordering::Relaxed) {
                log::debug!("{message}");
            } else {
                log::warn!("{message}, and others may too");
            }
            Ok(())
        }
        result => result.explain(|| format!("cannot set its attribute {}", quoted(name))),
    }
}

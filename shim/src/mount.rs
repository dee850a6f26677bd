//! Attributes of mounts (mount_setattr(2)).

use std::os::fd::{AsRawFd, BorrowedFd};

/// Sets and clears attributes (`MOUNT_ATTR_*`) of a whole tree of mounts, and sets its propagation
/// (`MS_*`).
pub(crate) fn change_attributes(
    tree: BorrowedFd<'_>,
    set: u64,
    clear: u64,
    propagation: libc::c_ulong,
) -> std::io::Result<()> {
    let attr = libc::mount_attr { attr_set: set, attr_clr: clear, propagation, userns_fd: 0 };
    mount_setattr(tree, true, &attr)
}

/// Changes the mount that `tree` names, and all mounts below it if `recursive`.
pub(crate) fn mount_setattr(
    tree: BorrowedFd<'_>,
    recursive: bool,
    attr: &libc::mount_attr,
) -> std::io::Result<()> {
    let recursive = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a NUL-terminated string, `attr` is a valid mount_attr that outlives the
    // call, and its size is given. The kernel only reads both (mount_setattr(2)).
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            std::ptr::from_ref(attr),
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

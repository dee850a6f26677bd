//! Flags of an open: for the host's kernel, for the guest's, and unknown ones.

use std::io;

use super::host::error;

/// Flags for the host's kernel.
const HOST_FLAGS: i32 = libc::O_ACCMODE
    | libc::O_APPEND
    | libc::O_DIRECTORY
    | libc::O_DSYNC
    | libc::O_NOATIME
    | libc::O_NONBLOCK
    | libc::O_SYNC
    | libc::O_TRUNC;

/// Flags for the guest's kernel. `O_DIRECT` is among them: it bypasses the guest's cache. The
/// guest's buffers need not be aligned for the host's device.
const GUEST_FLAGS: i32 = libc::O_ASYNC
    | libc::O_CLOEXEC
    | libc::O_CREAT
    | libc::O_DIRECT
    | libc::O_EXCL
    | libc::O_NOCTTY
    | libc::O_NOFOLLOW
    | O_LARGEFILE
    | FMODE_EXEC
    | FMODE_NONOTIFY;

/// libc defines `O_LARGEFILE` as 0 on 64-bit targets; guests send the real bit.
const O_LARGEFILE: i32 = 0o100_000;

/// Internal flags that Linux does not remove (include/linux/fs.h): an open by `execve`, and one by
/// fanotify, whose bit differs between versions.
const FMODE_EXEC: i32 = 1 << 5;
const FMODE_NONOTIFY: i32 = 1 << 25 | 1 << 26;

/// Returns the flags for the host's kernel. `EINVAL` for unknown flags, which could be dangerous:
/// with `O_PATH` the host's kernel would ignore `O_CREAT` and `O_EXCL`, and follow a link.
pub(super) fn host_flags(flags: u32) -> io::Result<i32> {
    if flags & !(HOST_FLAGS | GUEST_FLAGS) as u32 != 0 {
        return Err(error(libc::EINVAL));
    }
    Ok(flags as i32 & HOST_FLAGS)
}

//! Flags of an open: those for the host's kernel, those for the guest's, and all others.

use std::io;

use super::host::error;

/// Flags of an open that are the host's matter.
const HOST_FLAGS: i32 = libc::O_ACCMODE
    | libc::O_APPEND
    | libc::O_DIRECTORY
    | libc::O_DSYNC
    | libc::O_NOATIME
    | libc::O_NONBLOCK
    | libc::O_SYNC
    | libc::O_TRUNC;

/// Flags of an open that are the guest's matter. `O_DIRECT` is one of them: it bypasses the guest's
/// cache, and what the guest reads and writes need not be aligned as the host's device wants it.
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

/// libc defines it as 0 on 64-bit targets; guests send the real bit.
const O_LARGEFILE: i32 = 0o100_000;

/// Linux's own, which it does not take off (include/linux/fs.h): an open by `execve`, and one by
/// fanotify, which is a different bit in each version.
const FMODE_EXEC: i32 = 1 << 5;
const FMODE_NONOTIFY: i32 = 1 << 25 | 1 << 26;

/// The host's part of the flags of an open. Flags that are not known could be any: with `O_PATH` the
/// host's kernel would ignore `O_CREAT` and `O_EXCL`, and follow a link.
///
/// # Errors
///
/// `EINVAL` for flags that are not known.
pub(super) fn host_flags(flags: u32) -> io::Result<i32> {
    if flags & !(HOST_FLAGS | GUEST_FLAGS) as u32 != 0 {
        return Err(error(libc::EINVAL));
    }
    Ok(flags as i32 & HOST_FLAGS)
}

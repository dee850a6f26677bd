//! A change of a lock, in the form of the host's system calls.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use fuse_backend_rs::abi::fuse_abi::{FileLock, LK_FLOCK, LkIn};

use super::host::{done, error};
use super::ranges::Ranges;

/// End of a range without an end (`OFFSET_MAX` of Linux).
const OFFSET_MAX: u64 = i64::MAX as u64;

/// A change of a lock.
#[derive(Clone, Copy)]
pub(super) enum Change {
    Flock(libc::c_int),
    Record(libc::flock64),
}

impl Change {
    pub(super) fn of(asked: &LkIn) -> io::Result<Self> {
        let kind = asked.lk.type_ as libc::c_int;
        if asked.lk_flags & LK_FLOCK != 0 {
            return Ok(Self::Flock(match kind {
                libc::F_RDLCK => libc::LOCK_SH,
                libc::F_WRLCK => libc::LOCK_EX,
                libc::F_UNLCK => libc::LOCK_UN,
                _ => return Err(error(libc::EINVAL)),
            }));
        }
        Ok(Self::Record(record(&asked.lk)?))
    }

    /// Creates a release of all locks.
    pub(super) fn release_all(flock: bool) -> Self {
        if flock {
            Self::Flock(libc::LOCK_UN)
        } else {
            Self::Record(range(libc::F_UNLCK, (0, OFFSET_MAX)))
        }
    }

    /// Creates the release of this lock.
    pub(super) fn undone(self) -> Self {
        match self {
            Self::Flock(_) => Self::Flock(libc::LOCK_UN),
            Self::Record(of) => Self::Record(range(libc::F_UNLCK, ends(&of))),
        }
    }

    /// Creates a record lock for reading on these bytes.
    pub(super) fn read(bytes: (u64, u64)) -> Self {
        Self::Record(range(libc::F_RDLCK, bytes))
    }

    /// Returns true for a lock that requires a description open for writing.
    pub(super) fn is_write(&self) -> bool {
        matches!(self, Self::Record(range) if libc::c_int::from(range.l_type) == libc::F_WRLCK)
    }

    /// Adds a record lock for reading to `ranges`, or removes it.
    pub(super) fn note(&self, ranges: &mut Ranges) -> io::Result<()> {
        let Self::Record(record) = self else { return Ok(()) };
        if self.releases() {
            ranges.remove(ends(record));
            return Ok(());
        }
        ranges.add(ends(record))
    }

    /// Returns true if the owner has no lock afterwards.
    pub(super) fn releases_all(&self) -> bool {
        match self {
            Self::Flock(operation) => *operation == libc::LOCK_UN,
            Self::Record(range) => self.releases() && range.l_start == 0 && range.l_len == 0,
        }
    }

    pub(super) fn releases(&self) -> bool {
        match self {
            Self::Flock(operation) => *operation == libc::LOCK_UN,
            Self::Record(range) => libc::c_int::from(range.l_type) == libc::F_UNLCK,
        }
    }

    pub(super) fn make(&self, description: BorrowedFd<'_>, wait: bool) -> io::Result<()> {
        let fd = description.as_raw_fd();
        match self {
            Self::Flock(operation) => {
                let operation = operation | if wait { 0 } else { libc::LOCK_NB };
                // SAFETY: the call takes numbers only.
                done(unsafe { libc::flock(fd, operation) })
            }
            Self::Record(range) => {
                let command = if wait { libc::F_OFD_SETLKW } else { libc::F_OFD_SETLK };
                let range: *const libc::flock64 = range;
                // SAFETY: the command takes a pointer to a range, which it only reads.
                done(unsafe { libc::fcntl(fd, command, range) })
            }
        }
    }
}

/// Converts a range to fcntl(2)'s form.
pub(super) fn record(asked: &FileLock) -> io::Result<libc::flock64> {
    let kind = libc::c_short::try_from(asked.type_).map_err(|_| error(libc::EINVAL))?;
    if asked.start > asked.end || asked.start > OFFSET_MAX {
        return Err(error(libc::EINVAL));
    }
    Ok(range(kind.into(), (asked.start, asked.end)))
}

/// Returns the bytes from `start` to `end`, both included. An end of [`OFFSET_MAX`] or more stands
/// for all bytes behind `start`.
fn range(kind: libc::c_int, (start, end): (u64, u64)) -> libc::flock64 {
    let len = if end >= OFFSET_MAX { 0 } else { end - start + 1 };
    libc::flock64 {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start as i64,
        l_len: len as i64,
        // The kernel requires 0 for locks of a description.
        l_pid: 0,
    }
}

/// Returns the first and the last byte.
pub(super) fn ends(range: &libc::flock64) -> (u64, u64) {
    let start = range.l_start as u64;
    (start, if range.l_len == 0 { OFFSET_MAX } else { start + (range.l_len as u64 - 1) })
}

//! File descriptors: sending, inheriting and waiting.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd},
};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use tokio::io::unix::AsyncFd;

use crate::{
    error::{Error, Explain, Result},
    limits,
};

/// Sends a descriptor over a unix socket, with a text of at least one byte.
pub(crate) fn send(socket: impl AsFd, descriptor: impl AsFd, text: &[u8]) -> io::Result<()> {
    let descriptors = [descriptor.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("no space for the descriptor"));
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(text)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Lets `descriptors` and the standard streams through the next `execve`, and no other descriptor.
/// Restores the descriptor limit that this process was started with. For use between `fork` and
/// `execve`.
pub(crate) fn inherit_only(descriptors: &[RawFd]) -> io::Result<()> {
    limits::restore()?;
    // SAFETY: close_range(2) with CLOSE_RANGE_CLOEXEC only sets flags; no pointer is passed.
    let result = unsafe {
        libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    for fd in descriptors {
        // SAFETY: the caller's descriptors stay open until execve: nothing between fork and here
        // closes one.
        let fd = unsafe { BorrowedFd::borrow_raw(*fd) };
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
    }
    Ok(())
}

/// Takes over a descriptor that this process finds by its number on its command line.
///
/// # Errors
///
/// If the descriptor is a standard stream or not open, as when a person types the number.
pub(crate) fn take_inherited(number: RawFd) -> Result<OwnedFd> {
    if number <= 2 {
        return Err(Error::new(format!("descriptor {number} is a standard stream")));
    }
    // SAFETY: the number comes from the command line that was made for this process, and callers
    // take it before they open anything that could get it. So nothing else owns the descriptor. The
    // next call checks that it is open, before it is used for anything.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    match rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC) {
        Ok(()) => Ok(fd),
        Err(e) => {
            // Closing a descriptor that is not open would abort.
            let number = fd.into_raw_fd();
            Err(e).explain(|| format!("descriptor {number} cannot be used"))
        }
    }
}

/// Registers a descriptor that tasks can wait for.
pub(crate) fn wait_for(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the returned value owns the descriptor and gives it out by reference only. So it
    // stays open, and the same file, as long as it is registered.
    unsafe { AsyncFd::register(fd) }.map_err(Into::into)
}

/// It is `/dev/null`, or not open at all.
pub(crate) fn is_null(fd: BorrowedFd<'_>) -> bool {
    match rustix::fs::fstat(fd) {
        Ok(stat) => {
            rustix::fs::FileType::from_raw_mode(stat.st_mode)
                == rustix::fs::FileType::CharacterDevice
                && stat.st_rdev == rustix::fs::makedev(1, 3)
        }
        Err(_) => true,
    }
}

//! Reads and writes, between the host's file and guest memory without a copy.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use fuse_backend_rs::abi::fuse_abi::{
    FallocateIn, LseekIn, ReadIn, WRITE_CACHE, WRITE_KILL_PRIV, WriteIn,
};

use super::super::chain::{Buffers, returned};
use super::credentials::WithoutFsetid;
use super::files::Files;
use super::host::{done, error};

impl Files {
    /// Reads into `room`. Returns the number of bytes.
    pub(super) fn read(&self, id: u64, asked: &ReadIn, room: &Buffers<'_>) -> io::Result<usize> {
        let handle = self.handles.get(asked.fh, id)?;
        if asked.size as usize > room.len() {
            return Err(error(libc::EINVAL));
        }
        let offset = position(asked.offset)?;
        let buffers = room.iovecs(asked.size as usize);
        let (fd, count) = (handle.fd().as_raw_fd(), buffers.len() as libc::c_int);
        // SAFETY: the buffers are in guest memory, which stays mapped while `room` borrows it.
        returned(unsafe { libc::preadv64(fd, buffers.as_ptr(), count, offset) })
    }

    /// Writes the data of a request. Returns the number of bytes.
    pub(super) fn write(&self, id: u64, asked: &WriteIn, data: &Buffers<'_>) -> io::Result<usize> {
        let handle = self.handles.get(asked.fh, id)?;
        let delayed = asked.fuse_flags & WRITE_CACHE != 0;
        // Of the flags that `fcntl` changes, only `O_APPEND` matters here. Delayed writes of a
        // mapping have their offset.
        let append = !delayed && asked.flags & libc::O_APPEND as u32 != 0;
        let _without = WithoutFsetid::when(asked.fuse_flags & WRITE_KILL_PRIV != 0)?;
        if append == handle.appends() {
            return write_at(handle.fd(), asked, data);
        }
        let twin = handle.append_twin(|flags| {
            let slot = self.slot()?;
            Ok(slot.hold(self.proc_self_fd.reopen(handle.fd(), flags)?))
        })?;
        write_at(twin.as_fd(), asked, data)
    }

    pub(super) fn allocate(&self, id: u64, asked: &FallocateIn) -> io::Result<()> {
        let handle = self.handles.get(asked.fh, id)?;
        let (offset, len) = (position(asked.offset)?, position(asked.length)?);
        let fd = handle.fd().as_raw_fd();
        // SAFETY: the call takes numbers only.
        done(unsafe { libc::fallocate64(fd, asked.mode as libc::c_int, offset, len) })
    }

    /// Finds data or a hole in a file, or an entry of a directory.
    pub(super) fn seek(&self, id: u64, asked: &LseekIn) -> io::Result<u64> {
        let handle = self.handles.get(asked.fh, id)?;
        let offset = position(asked.offset)?;
        let _position = handle.position();
        let fd = handle.fd().as_raw_fd();
        // SAFETY: the call takes numbers only.
        let found = unsafe { libc::lseek64(fd, offset, asked.whence as libc::c_int) };
        u64::try_from(found).map_err(|_| io::Error::last_os_error())
    }
}

fn write_at(fd: BorrowedFd<'_>, asked: &WriteIn, data: &Buffers<'_>) -> io::Result<usize> {
    let offset = position(asked.offset)?;
    let buffers = data.iovecs(asked.size as usize);
    let (fd, count) = (fd.as_raw_fd(), buffers.len() as libc::c_int);
    // SAFETY: the buffers are in guest memory, which stays mapped while `data` borrows it.
    returned(unsafe { libc::pwritev64(fd, buffers.as_ptr(), count, offset) })
}

fn position(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| error(libc::EINVAL))
}

//! Attributes of files: reads and changes.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{
    AttrOut, FATTR_FH, GETATTR_FH, GetattrIn, Kstatfs, SetattrIn, SetattrValid,
};

use super::credentials::WithoutFsetid;
use super::files::Files;
use super::host::{done, error, statvfs};
use super::node::Node;
use super::stat::Stat;

impl Files {
    pub(super) fn attributes(&self, id: u64, asked: &GetattrIn) -> io::Result<AttrOut> {
        if asked.flags & GETATTR_FH != 0 {
            let handle = self.handles.get(asked.fh, id)?;
            return Ok(self.attr_out(&handle.node, &Stat::of(handle.fd())?));
        }
        let node = self.nodes.find(id)?;
        let stat = self.stat(&node)?;
        Ok(self.attr_out(&node, &stat))
    }

    fn attr_out(&self, node: &Node, stat: &Stat) -> AttrOut {
        let timeout = self.timeout(node);
        AttrOut {
            attr_valid: timeout.as_secs(),
            attr_valid_nsec: timeout.subsec_nanos(),
            dummy: 0,
            attr: stat.attr(false),
        }
    }

    /// Changes attributes, through a handle if the guest names one.
    pub(super) fn set_attributes(&self, id: u64, asked: &SetattrIn) -> io::Result<AttrOut> {
        let valid = SetattrValid::from_bits_truncate(asked.valid);
        let by_handle = asked.valid & FATTR_FH != 0;
        let handle = by_handle.then(|| self.handles.get(asked.fh, id)).transpose()?;
        let node = match &handle {
            Some(handle) => Arc::clone(&handle.node),
            None => self.nodes.find(id)?,
        };
        node.refuse_traced()?;
        let file = match &handle {
            Some(handle) => Arc::clone(&handle.file),
            None => self.file(&node)?,
        };
        let fd = file.as_fd();
        if valid.contains(SetattrValid::MODE) {
            self.proc_self_fd.chmod(fd, asked.mode)?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            change_owner(fd, asked, valid)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let _without = WithoutFsetid::when(valid.contains(SetattrValid::KILL_SUIDGID))?;
            self.set_size(&node, fd, handle.is_some(), asked.size)?;
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            self.proc_self_fd.set_times(fd, &times(asked, valid))?;
        }
        let stat = Stat::of(fd)?;
        self.refuse_gone(&node, &stat)?;
        Ok(self.attr_out(&node, &stat))
    }

    fn set_size(
        &self,
        node: &Node,
        fd: BorrowedFd<'_>,
        is_handle: bool,
        size: u64,
    ) -> io::Result<()> {
        let size = i64::try_from(size).map_err(|_| error(libc::EFBIG))?;
        if is_handle {
            // SAFETY: the call takes numbers only.
            return done(unsafe { libc::ftruncate64(fd.as_raw_fd(), size) });
        }
        if node.kind != libc::S_IFREG {
            return Err(error(libc::EBADF));
        }
        // A process of the host may still use a file without a name.
        self.refuse_gone(node, &Stat::of(fd)?)?;
        let file = self.proc_self_fd.reopen(fd, libc::O_RDWR | libc::O_NONBLOCK)?;
        // SAFETY: the call takes numbers only.
        done(unsafe { libc::ftruncate64(file.as_raw_fd(), size) })
    }

    /// Returns the sizes of the node's file system.
    pub(super) fn file_system_sizes(&self, id: u64) -> io::Result<Kstatfs> {
        let node = self.nodes.find(id)?;
        let file = self.file(&node)?;
        Ok(Kstatfs::from(statvfs(file.as_fd())?))
    }
}

fn change_owner(fd: BorrowedFd<'_>, asked: &SetattrIn, valid: SetattrValid) -> io::Result<()> {
    const UNCHANGED: u32 = u32::MAX;
    let uid = if valid.contains(SetattrValid::UID) { asked.uid } else { UNCHANGED };
    let gid = if valid.contains(SetattrValid::GID) { asked.gid } else { UNCHANGED };
    let flags = libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW;
    // SAFETY: the name is a C string, and the call keeps none of its arguments.
    done(unsafe { libc::fchownat(fd.as_raw_fd(), c"".as_ptr(), uid, gid, flags) })
}

fn times(asked: &SetattrIn, valid: SetattrValid) -> [libc::timespec; 2] {
    let time = |set, now, seconds: u64, nanoseconds: u32| {
        let tv_nsec = match (valid.contains(now), valid.contains(set)) {
            (true, _) => libc::UTIME_NOW,
            (false, true) => nanoseconds.into(),
            (false, false) => libc::UTIME_OMIT,
        };
        libc::timespec { tv_sec: seconds as i64, tv_nsec }
    };
    let (access, change) = (SetattrValid::ATIME, SetattrValid::MTIME);
    [
        time(access, SetattrValid::ATIME_NOW, asked.atime, asked.atimensec),
        time(change, SetattrValid::MTIME_NOW, asked.mtime, asked.mtimensec),
    ]
}

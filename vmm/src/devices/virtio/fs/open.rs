//! Open files: opened, created and closed.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd};
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, EntryOut, FOPEN_IN_KILL_SUIDGID, OpenIn, OpenOptions, OpenOut,
};

use super::credentials::{Acting, WithoutFsetid};
use super::descriptor::Descriptor;
use super::dispatch::Caller;
use super::files::Files;
use super::handle::Handle;
use super::host::{component, done, error, open_at};
use super::node::Node;
use super::open_flags::host_flags;
use super::stat::Stat;

impl Files {
    /// Opens a regular file, or a directory with `O_DIRECTORY`.
    pub(super) fn open_node(&self, id: u64, asked: &OpenIn, more: i32) -> io::Result<OpenOut> {
        let flags = host_flags(asked.flags)? | more;
        let node = self.nodes.find(id)?;
        node.refuse_traced()?;
        // Opening another kind of file would reach a driver, or a process at the other end.
        if !matches!(node.kind, libc::S_IFREG | libc::S_IFDIR) {
            return Err(error(libc::EBADF));
        }
        let file = self.file(&node)?;
        self.refuse_gone(&node, &Stat::of(file.as_fd())?)?;
        let slot = self.slot()?;
        let kill = asked.fuse_flags & FOPEN_IN_KILL_SUIDGID != 0;
        let without = WithoutFsetid::when(kill)?;
        let fd = self.proc_self_fd.reopen(file.as_fd(), flags)?;
        drop(without);
        let handle = Handle::new(Arc::clone(&node), Arc::new(slot.hold(fd)), flags);
        Ok(self.opened(&node, self.handles.add(handle)))
    }

    /// Opens a directory.
    pub(super) fn open_directory(&self, id: u64, asked: &OpenIn) -> io::Result<OpenOut> {
        self.open_node(id, asked, libc::O_DIRECTORY)
    }

    fn opened(&self, node: &Node, handle: u64) -> OpenOut {
        let mut options = OpenOptions::empty();
        if self.keeps_content(node) && !node.is_dir() {
            options |= OpenOptions::KEEP_CACHE;
        }
        OpenOut { fh: handle, open_flags: options.bits(), passthrough: 0 }
    }

    /// Makes a file and opens it.
    pub(super) fn create(
        &self,
        caller: &Caller,
        parent: u64,
        name: &CStr,
        asked: &CreateIn,
    ) -> io::Result<(EntryOut, OpenOut)> {
        let name = component(name)?;
        let flags = host_flags(asked.flags)?;
        if flags & libc::O_DIRECTORY != 0 {
            return Err(error(libc::EINVAL));
        }
        let exclusive = asked.flags & libc::O_EXCL as u32 != 0;
        let dir = self.nodes.find(parent)?;
        dir.refuse_traced()?;
        let dir_file = self.file(&dir)?;
        let slot = self.slot()?;
        let made = {
            let _acting = Acting::for_user(caller.uid, caller.gid)?;
            let flags = flags | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW;
            let mode = asked.mode & !(asked.umask & 0o777);
            open_at(dir_file.as_fd(), name, flags, mode)
        };
        // The guest has not checked the user's right to open an existing file. It looks the name up
        // again on `ESTALE`, and checks.
        let fd = made.map_err(|e| match e.raw_os_error() {
            Some(libc::EEXIST) if !exclusive => error(libc::ESTALE),
            _ => self.gone_or(&dir, &dir_file, e),
        })?;
        self.hand_out(&dir, name, slot.hold(fd), flags)
    }

    /// Makes a file without a name and opens it. It can get a name later (`O_TMPFILE` of open(2)).
    pub(super) fn create_unnamed(
        &self,
        caller: &Caller,
        parent: u64,
        asked: &CreateIn,
    ) -> io::Result<(EntryOut, OpenOut)> {
        let flags = host_flags(asked.flags & !(libc::O_TMPFILE as u32))?;
        let dir = self.nodes.find(parent)?;
        dir.refuse_traced()?;
        let dir_file = self.file(&dir)?;
        let slot = self.slot()?;
        let fd = {
            let _acting = Acting::for_user(caller.uid, caller.gid)?;
            let mode = asked.mode & !asked.umask & 0o7777;
            open_at(dir_file.as_fd(), c".", flags | libc::O_TMPFILE, mode)
        };
        let fd = fd.map_err(|e| self.gone_or(&dir, &dir_file, e))?;
        self.hand_out(&dir, c"", slot.hold(fd), flags)
    }

    /// Returns the entry and the handle of a file that was just made.
    fn hand_out(
        &self,
        dir: &Arc<Node>,
        name: &CStr,
        file: Descriptor,
        flags: i32,
    ) -> io::Result<(EntryOut, OpenOut)> {
        let file = Arc::new(file);
        let found = self.made(dir, name, &file)?;
        let handle = Handle::new(Arc::clone(&found.node), Arc::clone(&file), flags);
        found.node.share(&file);
        let entry = self.entry_out(&found);
        Ok((entry, self.opened(&found.node, self.handles.add(handle))))
    }

    /// Closes a handle, and releases the locks that were taken through it.
    pub(super) fn close(&self, node: u64, handle: u64) -> io::Result<()> {
        let closed = self.handles.take(handle, node)?;
        if closed.had_locks() {
            self.locks.release_handle(handle);
        }
        // Another handle may keep a file without a name open.
        if closed.node.lends(&closed.file)
            && let Ok(slot) = self.slot()
            && let Ok(fd) = self.proc_self_fd.reopen(closed.fd(), libc::O_PATH)
        {
            closed.node.part_with(&closed.file, Some(slot.hold(fd)));
        }
        drop(closed);
        Ok(())
    }

    /// Handles the close of one of the guest's descriptors. Releases the owner's record locks, and
    /// returns the host file system's error of earlier writes.
    pub(super) fn flush(&self, node: u64, handle: u64, owner: u64) -> io::Result<()> {
        let handle = self.handles.get(handle, node)?;
        self.locks.release_owner(&handle.node, owner);
        let fd = handle.fd().try_clone_to_owned()?.into_raw_fd();
        // SAFETY: the descriptor was just made here, and is not used afterwards.
        done(unsafe { libc::close(fd) })
    }

    /// Writes a file or directory to its disk.
    pub(super) fn sync(&self, node: u64, handle: u64, data_only: bool) -> io::Result<()> {
        let handle = self.handles.get(handle, node)?;
        let fd = handle.fd().as_raw_fd();
        let sync = if data_only { libc::fdatasync } else { libc::fsync };
        // SAFETY: the call takes a number only.
        done(unsafe { sync(fd) })
    }
}

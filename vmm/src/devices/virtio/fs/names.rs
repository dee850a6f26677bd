//! Names: made, removed and renamed.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{EntryOut, MkdirIn, MknodIn};

use super::credentials::Acting;
use super::descriptor::Descriptor;
use super::dispatch::Caller;
use super::files::{Files, stale};
use super::host::{component, done, error, read_link};
use super::node::Node;

const RENAME_FLAGS: u32 = libc::RENAME_EXCHANGE | libc::RENAME_NOREPLACE | libc::RENAME_WHITEOUT;

impl Files {
    /// Returns a directory of the guest's in which names may change.
    fn directory(&self, id: u64) -> io::Result<(Arc<Node>, Arc<Descriptor>)> {
        let dir = self.nodes.find(id)?;
        dir.refuse_traced()?;
        let file = self.file(&dir)?;
        Ok((dir, file))
    }

    /// Makes a file of this name as the caller, and looks it up for the guest.
    fn make(
        &self,
        caller: &Caller,
        parent: u64,
        name: &CStr,
        make: impl FnOnce(BorrowedFd<'_>, &CStr) -> io::Result<()>,
    ) -> io::Result<EntryOut> {
        let name = component(name)?;
        let (dir, file) = self.directory(parent)?;
        {
            let _acting = Acting::for_user(caller.uid, caller.gid)?;
            make(file.as_fd(), name)
        }
        .map_err(|e| self.gone_or(&dir, &file, e))?;
        self.lookup_in(&dir, name).map(|found| self.entry_out(&found))
    }

    pub(super) fn make_directory(
        &self,
        caller: &Caller,
        parent: u64,
        name: &CStr,
        asked: &MkdirIn,
    ) -> io::Result<EntryOut> {
        let mode = asked.mode & !asked.umask;
        self.make(caller, parent, name, |dir, name| {
            // SAFETY: the name is a C string, and the call keeps none of its arguments.
            done(unsafe { libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), mode) })
        })
    }

    /// Makes a file, pipe, socket or device. Other devices than 0:0 need the configuration's
    /// permission. The device 0:0 is overlayfs's whiteout.
    pub(super) fn make_node(
        &self,
        caller: &Caller,
        parent: u64,
        name: &CStr,
        asked: &MknodIn,
    ) -> io::Result<EntryOut> {
        let allowed = match asked.mode & libc::S_IFMT {
            libc::S_IFCHR => self.devices || asked.rdev == 0,
            libc::S_IFBLK => self.devices,
            _ => true,
        };
        if !allowed {
            return Err(error(libc::EPERM));
        }
        let mode = asked.mode & !asked.umask;
        self.make(caller, parent, name, |dir, name| {
            // SAFETY: the name is a C string, and the call keeps none of its arguments.
            done(unsafe { libc::mknodat(dir.as_raw_fd(), name.as_ptr(), mode, asked.rdev.into()) })
        })
    }

    pub(super) fn make_symlink(
        &self,
        caller: &Caller,
        parent: u64,
        name: &CStr,
        target: &CStr,
    ) -> io::Result<EntryOut> {
        self.make(caller, parent, name, |dir, name| {
            // SAFETY: both names are C strings, and the call keeps none of its arguments.
            done(unsafe { libc::symlinkat(target.as_ptr(), dir.as_raw_fd(), name.as_ptr()) })
        })
    }

    /// Gives a file one more name.
    pub(super) fn make_link(&self, id: u64, parent: u64, name: &CStr) -> io::Result<EntryOut> {
        let name = component(name)?;
        let node = self.nodes.find(id)?;
        node.refuse_traced()?;
        let file = self.file(&node)?;
        let (dir, dir_file) = self.directory(parent)?;
        self.proc_self_fd.link(file.as_fd(), dir_file.as_fd(), name).map_err(|e| {
            // Either the file or the directory may be gone.
            let e = self.gone_or(&node, &file, e);
            self.gone_or(&dir, &dir_file, e)
        })?;
        self.lookup_in(&dir, name).map(|found| self.entry_out(&found))
    }

    /// Removes a name. With `AT_REMOVEDIR` it is the name of a directory.
    pub(super) fn remove(&self, parent: u64, name: &CStr, flags: i32) -> io::Result<()> {
        let name = component(name)?;
        let (_, dir) = self.directory(parent)?;
        self.pin(&dir, name);
        // SAFETY: the name is a C string, and the call keeps none of its arguments.
        done(unsafe { libc::unlinkat(dir.as_fd().as_raw_fd(), name.as_ptr(), flags) })
    }

    pub(super) fn rename(
        &self,
        (from, from_name): (u64, &CStr),
        (to, to_name): (u64, &CStr),
        flags: u32,
    ) -> io::Result<()> {
        let (from_name, to_name) = (component(from_name)?, component(to_name)?);
        let flags = flags & RENAME_FLAGS;
        let (from_dir, from_file) = self.directory(from)?;
        let (to_dir, to_file) = self.directory(to)?;
        if flags & (libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE) == 0 {
            self.pin(&to_file, to_name);
        }
        let (old, new) = (from_file.as_fd().as_raw_fd(), to_file.as_fd().as_raw_fd());
        // SAFETY: the names are C strings, and the call keeps none of its arguments.
        done(unsafe { libc::renameat2(old, from_name.as_ptr(), new, to_name.as_ptr(), flags) })?;
        self.moved(&to_dir, &to_file, to_name);
        if flags & libc::RENAME_EXCHANGE != 0 {
            self.moved(&from_dir, &from_file, from_name);
        }
        Ok(())
    }

    /// Returns the target of a symbolic link. A link without a descriptor is read by its name.
    pub(super) fn link_target(&self, id: u64) -> io::Result<Vec<u8>> {
        let node = self.nodes.find(id)?;
        node.refuse_traced()?;
        if let Some(file) = node.file() {
            return read_link(file.as_fd(), c"");
        }
        let place = node.place();
        let parent = self.nodes.find(place.parent).map_err(|_| error(libc::ESTALE))?;
        let dir = self.file(&parent)?;
        read_link(dir.as_fd(), &place.name).map_err(|e| match e.raw_os_error() {
            Some(libc::EINVAL) => error(libc::ESTALE),
            _ => stale(e),
        })
    }
}

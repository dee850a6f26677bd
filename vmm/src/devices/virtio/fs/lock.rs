//! Locks of the guest's processes, held on the host, where other microVMs and the host's own
//! processes see them.
//!
//! Each owner has an open file description for each file. Record locks set by `F_OFD_SETLK` belong
//! to the description, as locks of `flock(2)` always do. Closing the description releases them.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{FileLock, LK_FLOCK, LkIn, LkOut};

use super::files::Files;
use super::handle::Handle;
use super::host::{done, error};
use super::lock_change::{Change, ends, record};
use super::lock_table::{Key, Owner};

/// A wait for a lock that another owner holds, on a thread of its own.
pub(super) struct Wait {
    key: Key,
    owner: Arc<Owner>,
    change: Change,
    node: u64,
    handle: u64,
}

impl Wait {
    /// Waits for the lock. `EINTR` on a signal.
    pub(super) fn block(&self) -> io::Result<()> {
        self.change.make(self.owner.fd(), true)
    }

    /// Makes sure that the owner has the lock after the wait. Returns true if the wait must be
    /// repeated.
    ///
    /// Another thread of the process may have closed the file through another descriptor. That
    /// releases all locks of the process, but ends no wait. Another thread may also have taken
    /// locks since, through another description. `EBADF` if the guest has closed the handle,
    /// `ENOLCK` if the owner has too many ranges.
    pub(super) fn settle(&mut self, files: &Files) -> io::Result<bool> {
        let now = files.locks.get_or_insert(self.key, &self.owner);
        // Without a handle no request would release the lock.
        if let Err(e) = files.handles.get(self.handle, self.node) {
            files.locks.remove(&self.key);
            self.give_back();
            return Err(e);
        }
        // Taking a held lock again notes it.
        let noted = if Arc::ptr_eq(&now, &self.owner) { now.change(self.change) } else { None };
        match noted {
            Some(Err(e)) => {
                self.give_back();
                Err(e)
            }
            Some(Ok(())) => Ok(false),
            None => {
                self.give_back();
                let handle = files.handles.get(self.handle, self.node)?;
                self.owner = files.owner(self.key, self.change, &handle, self.handle)?;
                Ok(true)
            }
        }
    }

    fn give_back(&self) {
        // Nothing can be done if the host does not release the lock.
        let _ = self.change.undone().make(self.owner.fd(), false);
    }
}

impl Files {
    /// Takes or releases a lock. If another owner holds it, returns the wait for it, or `EAGAIN` if
    /// the caller does not wait.
    pub(super) fn set_lock(&self, id: u64, asked: &LkIn, wait: bool) -> io::Result<Option<Wait>> {
        let handle = self.lockable(id, asked)?;
        let change = Change::of(asked)?;
        // A guest's kernel refuses this itself, and no description could take the lock.
        if change.is_write() && handle.flags & libc::O_ACCMODE == libc::O_RDONLY {
            return Err(error(libc::EBADF));
        }
        let key = key_of(&handle, asked);
        if change.releases_all() {
            self.locks.remove(&key);
            return Ok(None);
        }
        if change.releases() && self.locks.get(&key).is_none() {
            return Ok(None);
        }
        handle.note_lock();
        let (owner, made) = loop {
            let owner = self.owner(key, change, &handle, asked.fh)?;
            // Another request may have replaced the description since.
            if let Some(made) = owner.change(change) {
                break (owner, made);
            }
        };
        match made {
            Err(e) if wait && is_held(&e) => {
                Ok(Some(Wait { key, owner, change, node: id, handle: asked.fh }))
            }
            Err(e) if is_held(&e) => Err(error(libc::EAGAIN)),
            result => result.map(|()| None),
        }
    }

    /// Returns the description for a change of an owner's locks. If the owner's own is missing, or
    /// cannot take the change, a new one replaces it.
    fn owner(
        &self,
        key: Key,
        change: Change,
        handle: &Handle,
        number: u64,
    ) -> io::Result<Arc<Owner>> {
        if let Some(owner) = self.locks.get(&key).filter(|owner| owner.takes(&change)) {
            owner.use_handle(number);
            return Ok(owner);
        }
        self.locks.replace(key, &change, self.lock_owner(handle, number, key.flock)?)
    }

    /// Finds a lock that conflicts with the given one. The guest does not learn the holder's
    /// process.
    pub(super) fn get_lock(&self, id: u64, asked: &LkIn) -> io::Result<LkOut> {
        let handle = self.lockable(id, asked)?;
        let mut found = record(&asked.lk)?;
        let key = key_of(&handle, asked);
        let owner = match self.locks.get(&key) {
            Some(owner) => owner,
            None => Arc::new(self.lock_owner(&handle, asked.fh, key.flock)?),
        };
        let fd = owner.fd().as_raw_fd();
        let room: *mut libc::flock64 = &mut found;
        // SAFETY: the command takes a pointer to a range, which it may change.
        done(unsafe { libc::fcntl(fd, libc::F_OFD_GETLK, room) })?;
        let (start, end) = ends(&found);
        Ok(LkOut { lk: FileLock { start, end, type_: found.l_type as u32, pid: 0 } })
    }

    fn lockable(&self, id: u64, asked: &LkIn) -> io::Result<Arc<Handle>> {
        let handle = self.handles.get(asked.fh, id)?;
        // Linux handles locks of all other files itself.
        if handle.node.kind == libc::S_IFREG { Ok(handle) } else { Err(error(libc::EBADF)) }
    }

    /// Opens a new description. For record locks it is open for writing if the handle is, because a
    /// write lock requires that. For other locks it has the handle's access mode.
    fn lock_owner(&self, handle: &Handle, number: u64, flock: bool) -> io::Result<Owner> {
        let slot = self.slot()?;
        let open = |flags| self.proc_self_fd.reopen(handle.fd(), flags);
        let mode = handle.flags & libc::O_ACCMODE;
        let only_reads = mode == libc::O_RDONLY && !flock;
        let fd = if flock || only_reads {
            open(mode)
        } else {
            open(libc::O_RDWR).or_else(|_| open(mode))
        };
        Ok(Owner::new(slot.hold(fd?), number, only_reads))
    }
}

fn key_of(handle: &Handle, asked: &LkIn) -> Key {
    let flock = asked.lk_flags & LK_FLOCK != 0;
    Key { file: handle.node.identity.file(), owner: asked.owner, flock }
}

fn is_held(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}

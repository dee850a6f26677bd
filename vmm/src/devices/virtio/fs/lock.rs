//! Locks of the guest's processes, held on the host, where other microVMs and the host's own
//! processes see them.
//!
//! Each owner has an open file description of its own for each file: with `F_OFD_SETLK` record locks
//! belong to the description, as those of `flock(2)` always do. Closing it releases them.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use fuse_backend_rs::abi::fuse_abi::{FileLock, LK_FLOCK, LkIn, LkOut};

use super::descriptor::Descriptor;
use super::files::Files;
use super::handle::Handle;
use super::host::{done, error};
use super::lock_change::{Change, ends, record};
use super::node::Node;
use super::ranges::Ranges;
use super::stat::FileNumber;
use crate::sync::lock;

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    /// The file, by whatever mount it was opened: a process's locks hold for all of them.
    file: FileNumber,
    /// The guest's number for a process, or for an open file.
    owner: u64,
    /// The locks are those of `flock(2)`, which know nothing of the others.
    flock: bool,
}

/// The description that an owner's locks on a file belong to.
struct Owner {
    file: Descriptor,
    /// The handle that was last used for it.
    handle: AtomicU64,
    held: Mutex<Held>,
}

/// The locks of a description.
enum Held {
    /// Record locks for reading: the description cannot take others. One that can is made when it is needed and not
    /// before, since the host runs no program that is open for writing.
    Reading(Ranges),
    /// Any.
    Any,
    /// Another description has them now.
    Replaced,
}

impl Held {
    /// Whether the description can make this change.
    fn takes(&self, change: &Change) -> bool {
        match self {
            Self::Any => true,
            Self::Reading(_) => !change.is_write(),
            Self::Replaced => false,
        }
    }
}

impl Owner {
    fn takes(&self, change: &Change) -> bool {
        lock(&self.held).takes(change)
    }

    /// Gives all locks back. A description that somebody waits with stays open for a while.
    fn give_up(&self, flock: bool) {
        let mut held = lock(&self.held);
        // Nothing can be done about a host that does not take locks back.
        let _ = Change::release_all(flock).make(self.file.as_fd(), false);
        if let Held::Reading(ranges) = &mut *held {
            *ranges = Ranges::default();
        }
    }

    /// Makes a change that waits for nobody. `None` if another description is needed for it, or has the locks
    /// already.
    fn change(&self, change: Change) -> Option<io::Result<()>> {
        let mut held = lock(&self.held);
        if !held.takes(&change) {
            return None;
        }
        let make = || change.make(self.file.as_fd(), false);
        let Held::Reading(ranges) = &mut *held else { return Some(make()) };
        let mut changed = ranges.clone();
        let made = change.note(&mut changed).and_then(|()| make());
        if made.is_ok() {
            *ranges = changed;
        }
        Some(made)
    }
}

/// All descriptions with locks.
#[derive(Default)]
pub(super) struct Locks(Mutex<HashMap<Key, Arc<Owner>>>);

impl Locks {
    /// Releases what was locked through a handle.
    pub(super) fn release_handle(&self, handle: u64) {
        let used = |owner: &Arc<Owner>| owner.handle.load(Ordering::Relaxed) == handle;
        let gone: Vec<_> = lock(&self.0).extract_if(|_, owner| used(owner)).collect();
        gone.iter().for_each(|(key, owner)| owner.give_up(key.flock));
    }

    /// Releases an owner's record locks on a file.
    pub(super) fn release_owner(&self, node: &Node, owner: u64) {
        self.remove(&Key { file: node.identity.file(), owner, flock: false });
    }

    /// Releases all.
    pub(super) fn release_all(&self) {
        let gone = std::mem::take(&mut *lock(&self.0));
        drop(gone);
    }

    fn remove(&self, key: &Key) {
        let gone = lock(&self.0).remove(key);
        if let Some(owner) = gone {
            owner.give_up(key.flock);
        }
    }

    fn get(&self, key: &Key) -> Option<Arc<Owner>> {
        lock(&self.0).get(key).cloned()
    }
}

/// A lock that somebody else holds, to be waited for on a thread of its own.
pub(super) struct Wait {
    key: Key,
    owner: Arc<Owner>,
    change: Change,
    node: u64,
    handle: u64,
}

impl Wait {
    /// Waits for the lock.
    ///
    /// # Errors
    ///
    /// `EINTR` on a signal; and what the host's kernel says.
    pub(super) fn block(&self) -> io::Result<()> {
        self.change.make(self.owner.file.as_fd(), true)
    }

    /// Sees to it that the owner has the lock that was waited for, whatever its process has done meanwhile: another
    /// thread may have closed the file by another descriptor, which releases all locks of the process and ends no
    /// wait, or have taken locks since, with another description. Returns whether it is to be waited for once more.
    ///
    /// # Errors
    ///
    /// `EBADF` if the guest has closed the handle, and `ENOLCK`.
    pub(super) fn settle(&mut self, files: &Files) -> io::Result<bool> {
        let now = Arc::clone(
            lock(&files.locks.0).entry(self.key).or_insert_with(|| Arc::clone(&self.owner)),
        );
        // Without it nobody would release the lock.
        if let Err(e) = files.handles.get(self.handle, self.node) {
            files.locks.remove(&self.key);
            self.give_back();
            return Err(e);
        }
        // A lock that is there already is taken once more, which notes it.
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
        // Nothing can be done about a host that does not take locks back.
        let _ = self.change.undone().make(self.owner.file.as_fd(), false);
    }
}

impl Files {
    /// Takes or gives back a lock. Returns the wait for a lock of somebody else's, if the caller wants
    /// to wait.
    ///
    /// # Errors
    ///
    /// `EAGAIN` for a lock of somebody else's.
    pub(super) fn set_lock(&self, id: u64, asked: &LkIn, wait: bool) -> io::Result<Option<Wait>> {
        let handle = self.lockable(id, asked)?;
        let change = Change::of(asked)?;
        // A guest's kernel asks for no such thing, and no description would do.
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
            // Another request may have replaced it since.
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

    /// The description for a change of an owner's locks: the one that it has, a first one, or one that is open for
    /// writing in the place of one that is not.
    fn owner(
        &self,
        key: Key,
        change: Change,
        handle: &Handle,
        number: u64,
    ) -> io::Result<Arc<Owner>> {
        if let Some(owner) = self.locks.get(&key).filter(|owner| owner.takes(&change)) {
            owner.handle.store(number, Ordering::Relaxed);
            return Ok(owner);
        }
        let fresh = Arc::new(self.lock_owner(handle, number, key.flock)?);
        let mut all = lock(&self.locks.0);
        if let Some(old) = all.get(&key).cloned() {
            // Somebody was faster.
            if old.takes(&change) {
                return Ok(old);
            }
            let mut held = lock(&old.held);
            if let Held::Reading(ranges) = &*held {
                // Nobody has a lock that is in the way of these.
                for bytes in ranges.iter() {
                    Change::read(bytes).make(fresh.file.as_fd(), false)?;
                }
            }
            *held = Held::Replaced;
            let _ = Change::release_all(key.flock).make(old.file.as_fd(), false);
        }
        all.insert(key, Arc::clone(&fresh));
        Ok(fresh)
    }

    /// Finds a lock that is in the way of this one. The holder's process is not the guest's to know.
    pub(super) fn get_lock(&self, id: u64, asked: &LkIn) -> io::Result<LkOut> {
        let handle = self.lockable(id, asked)?;
        let mut found = record(&asked.lk)?;
        let key = key_of(&handle, asked);
        let owner = match self.locks.get(&key) {
            Some(owner) => owner,
            None => Arc::new(self.lock_owner(&handle, asked.fh, key.flock)?),
        };
        let fd = owner.file.as_fd().as_raw_fd();
        let room: *mut libc::flock64 = &mut found;
        // SAFETY: the command takes a range, which it may change.
        done(unsafe { libc::fcntl(fd, libc::F_OFD_GETLK, room) })?;
        let (start, end) = ends(&found);
        Ok(LkOut { lk: FileLock { start, end, type_: found.l_type as u32, pid: 0 } })
    }

    fn lockable(&self, id: u64, asked: &LkIn) -> io::Result<Arc<Handle>> {
        let handle = self.handles.get(asked.fh, id)?;
        // Linux keeps the locks of all other files to itself.
        if handle.node.kind == libc::S_IFREG { Ok(handle) } else { Err(error(libc::EBADF)) }
    }

    /// A description of its own. For record locks it is open for writing if the handle is, which a write lock takes;
    /// the other locks ask for no more than a handle has.
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
        let held = if only_reads { Held::Reading(Ranges::default()) } else { Held::Any };
        Ok(Owner { file: slot.hold(fd?), handle: AtomicU64::new(number), held: Mutex::new(held) })
    }
}

fn key_of(handle: &Handle, asked: &LkIn) -> Key {
    let flock = asked.lk_flags & LK_FLOCK != 0;
    Key { file: handle.node.identity.file(), owner: asked.owner, flock }
}

fn is_held(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}

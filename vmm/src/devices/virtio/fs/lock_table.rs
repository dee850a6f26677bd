//! Table of held locks: an open file description for each owner and file.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::descriptor::Descriptor;
use super::lock_change::Change;
use super::node::Node;
use super::ranges::Ranges;
use super::stat::FileNumber;
use crate::sync::lock;

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// The file by device and inode, because a process's locks hold through every mount.
    pub(super) file: FileNumber,
    /// The guest's number of a process, or of an open file.
    pub(super) owner: u64,
    /// True for locks of `flock(2)`, which are independent of record locks.
    pub(super) flock: bool,
}

/// The open file description of an owner's locks on a file.
pub(super) struct Owner {
    file: Descriptor,
    /// The handle of the last use.
    handle: AtomicU64,
    held: Mutex<Held>,
}

/// Locks of a description.
enum Held {
    /// Record locks for reading only. The description can take no others. A description open for
    /// writing is made only when needed, because the host executes no program that is open for
    /// writing.
    Reading(Ranges),
    /// Locks of any kind.
    Any,
    /// None: another description has replaced this one.
    Replaced,
}

impl Held {
    /// Returns true if the description can make this change.
    fn takes(&self, change: &Change) -> bool {
        match self {
            Self::Any => true,
            Self::Reading(_) => !change.is_write(),
            Self::Replaced => false,
        }
    }
}

impl Owner {
    /// Creates an owner without locks. Its description was opened for `handle`.
    pub(super) fn new(file: Descriptor, handle: u64, only_reads: bool) -> Self {
        let held = if only_reads { Held::Reading(Ranges::default()) } else { Held::Any };
        Self { file, handle: AtomicU64::new(handle), held: Mutex::new(held) }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Sets the handle of the last use.
    pub(super) fn use_handle(&self, handle: u64) {
        self.handle.store(handle, Ordering::Relaxed);
    }

    pub(super) fn takes(&self, change: &Change) -> bool {
        lock(&self.held).takes(change)
    }

    /// Releases all locks. A thread that waits with the description keeps it open for a while.
    fn give_up(&self, flock: bool) {
        let mut held = lock(&self.held);
        // Nothing can be done if the host does not release the locks.
        let _ = Change::release_all(flock).make(self.file.as_fd(), false);
        if let Held::Reading(ranges) = &mut *held {
            *ranges = Ranges::default();
        }
    }

    /// Makes a change without waiting. `None` if the change needs another description, or another
    /// one has the locks already.
    pub(super) fn change(&self, change: Change) -> Option<io::Result<()>> {
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
    /// Releases the locks that were taken through a handle.
    pub(super) fn release_handle(&self, handle: u64) {
        let used = |owner: &Arc<Owner>| owner.handle.load(Ordering::Relaxed) == handle;
        let gone: Vec<_> = lock(&self.0).extract_if(|_, owner| used(owner)).collect();
        gone.iter().for_each(|(key, owner)| owner.give_up(key.flock));
    }

    /// Releases an owner's record locks on a file.
    pub(super) fn release_owner(&self, node: &Node, owner: u64) {
        self.remove(&Key { file: node.identity.file(), owner, flock: false });
    }

    /// Releases all locks.
    pub(super) fn release_all(&self) {
        let gone = std::mem::take(&mut *lock(&self.0));
        drop(gone);
    }

    pub(super) fn remove(&self, key: &Key) {
        let gone = lock(&self.0).remove(key);
        if let Some(owner) = gone {
            owner.give_up(key.flock);
        }
    }

    pub(super) fn get(&self, key: &Key) -> Option<Arc<Owner>> {
        lock(&self.0).get(key).cloned()
    }

    /// Returns the owner's description. If there is none, `owner` becomes it.
    pub(super) fn get_or_insert(&self, key: Key, owner: &Arc<Owner>) -> Arc<Owner> {
        Arc::clone(lock(&self.0).entry(key).or_insert_with(|| Arc::clone(owner)))
    }

    /// Replaces the owner's description by `fresh`, unless the old one can make the change.
    pub(super) fn replace(
        &self,
        key: Key,
        change: &Change,
        fresh: Owner,
    ) -> io::Result<Arc<Owner>> {
        let fresh = Arc::new(fresh);
        let mut all = lock(&self.0);
        if let Some(old) = all.get(&key).cloned() {
            // Another request was faster.
            if old.takes(change) {
                return Ok(old);
            }
            let mut held = lock(&old.held);
            if let Held::Reading(ranges) = &*held {
                // No other lock can conflict with these.
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
}

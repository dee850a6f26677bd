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
use crate::sync::lock;

/// End of a range that has none (`OFFSET_MAX` of Linux).
const OFFSET_MAX: u64 = i64::MAX as u64;

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    node: u64,
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
}

/// All descriptions with locks.
#[derive(Default)]
pub(super) struct Locks(Mutex<HashMap<Key, Arc<Owner>>>);

impl Locks {
    /// Releases what was locked through a handle.
    pub(super) fn release_handle(&self, handle: u64) {
        let used = |owner: &Arc<Owner>| owner.handle.load(Ordering::Relaxed) == handle;
        let gone: Vec<_> = lock(&self.0).extract_if(|_, owner| used(owner)).collect();
        drop(gone);
    }

    /// Releases an owner's record locks on a file.
    pub(super) fn release_owner(&self, node: u64, owner: u64) {
        self.remove(&Key { node, owner, flock: false });
    }

    /// Releases all.
    pub(super) fn release_all(&self) {
        let gone = std::mem::take(&mut *lock(&self.0));
        drop(gone);
    }

    fn remove(&self, key: &Key) {
        let gone = lock(&self.0).remove(key);
        drop(gone);
    }

    fn get(&self, key: &Key) -> Option<Arc<Owner>> {
        lock(&self.0).get(key).cloned()
    }
}

/// A change of a lock, as the host's kernel takes it.
#[derive(Clone, Copy)]
enum Change {
    Flock(libc::c_int),
    Record(libc::flock64),
}

impl Change {
    fn of(asked: &LkIn) -> io::Result<Self> {
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

    /// The owner holds nothing afterwards.
    fn releases_all(&self) -> bool {
        match self {
            Self::Flock(operation) => *operation == libc::LOCK_UN,
            Self::Record(range) => self.releases() && range.l_start == 0 && range.l_len == 0,
        }
    }

    fn releases(&self) -> bool {
        match self {
            Self::Flock(operation) => *operation == libc::LOCK_UN,
            Self::Record(range) => libc::c_int::from(range.l_type) == libc::F_UNLCK,
        }
    }

    fn make(&self, owner: &Owner, wait: bool) -> io::Result<()> {
        let fd = owner.file.as_fd().as_raw_fd();
        match self {
            Self::Flock(operation) => {
                let operation = operation | if wait { 0 } else { libc::LOCK_NB };
                // SAFETY: it takes numbers only.
                done(unsafe { libc::flock(fd, operation) })
            }
            Self::Record(range) => {
                let command = if wait { libc::F_OFD_SETLKW } else { libc::F_OFD_SETLK };
                let range: *const libc::flock64 = range;
                // SAFETY: the command takes a range, which it only reads.
                done(unsafe { libc::fcntl(fd, command, range) })
            }
        }
    }
}

/// The range as fcntl(2) has it.
fn record(asked: &FileLock) -> io::Result<libc::flock64> {
    let kind = libc::c_short::try_from(asked.type_).map_err(|_| error(libc::EINVAL))?;
    if asked.start > asked.end || asked.start > OFFSET_MAX {
        return Err(error(libc::EINVAL));
    }
    let len = if asked.end >= OFFSET_MAX { 0 } else { asked.end - asked.start + 1 };
    Ok(libc::flock64 {
        l_type: kind,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: asked.start as i64,
        l_len: len as i64,
        // The kernel wants it so for locks of a description.
        l_pid: 0,
    })
}

/// A lock that somebody else holds, to be waited for on a thread of its own.
pub(super) struct Wait {
    key: Key,
    owner: Arc<Owner>,
    change: Change,
}

impl Wait {
    /// Waits for the lock.
    ///
    /// # Errors
    ///
    /// `EINTR` on a signal; and what the host's kernel says.
    pub(super) fn block(&self) -> io::Result<()> {
        self.change.make(&self.owner, true)
    }

    /// Checks that nothing has released the owner's locks meanwhile, as closing a descriptor does.
    ///
    /// # Errors
    ///
    /// `EBADF`.
    pub(super) fn check(&self, files: &Files) -> io::Result<()> {
        let now = files.locks.get(&self.key);
        let same = now.is_some_and(|owner| Arc::ptr_eq(&owner, &self.owner));
        if same { Ok(()) } else { Err(error(libc::EBADF)) }
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
        let key = key_of(id, asked);
        let known = self.locks.get(&key);
        if change.releases_all() {
            self.locks.remove(&key);
        }
        let owner = match known {
            Some(owner) => owner,
            None if change.releases() => return Ok(None),
            None => {
                let fresh = Arc::new(self.lock_owner(&handle, asked.fh)?);
                Arc::clone(lock(&self.locks.0).entry(key).or_insert(fresh))
            }
        };
        owner.handle.store(asked.fh, Ordering::Relaxed);
        handle.note_lock();
        match change.make(&owner, false) {
            Err(e) if wait && is_held(&e) => Ok(Some(Wait { key, owner, change })),
            Err(e) if is_held(&e) => Err(error(libc::EAGAIN)),
            result => result.map(|()| None),
        }
    }

    /// Finds a lock that is in the way of this one. The holder's process is not the guest's to know.
    pub(super) fn get_lock(&self, id: u64, asked: &LkIn) -> io::Result<LkOut> {
        let handle = self.lockable(id, asked)?;
        let mut range = record(&asked.lk)?;
        let owner = match self.locks.get(&key_of(id, asked)) {
            Some(owner) => owner,
            None => Arc::new(self.lock_owner(&handle, asked.fh)?),
        };
        let fd = owner.file.as_fd().as_raw_fd();
        let room: *mut libc::flock64 = &mut range;
        // SAFETY: the command takes a range, which it may change.
        done(unsafe { libc::fcntl(fd, libc::F_OFD_GETLK, room) })?;
        let start = range.l_start as u64;
        let end = if range.l_len == 0 { OFFSET_MAX } else { start + (range.l_len as u64 - 1) };
        Ok(LkOut { lk: FileLock { start, end, type_: range.l_type as u32, pid: 0 } })
    }

    fn lockable(&self, id: u64, asked: &LkIn) -> io::Result<Arc<Handle>> {
        let handle = self.handles.get(asked.fh, id)?;
        // Linux keeps the locks of all other files to itself.
        if handle.node.kind == libc::S_IFREG { Ok(handle) } else { Err(error(libc::EBADF)) }
    }

    /// A description of its own. It is open for writing where it can be, which a write lock takes;
    /// where it cannot be, the guest could not open it for writing either.
    fn lock_owner(&self, handle: &Handle, number: u64) -> io::Result<Owner> {
        let slot = self.slot()?;
        let open = |flags| self.proc_self_fd.reopen(handle.fd(), flags);
        let fd = open(libc::O_RDWR).or_else(|_| open(handle.flags & libc::O_ACCMODE))?;
        Ok(Owner { file: slot.hold(fd), handle: AtomicU64::new(number) })
    }
}

fn key_of(node: u64, asked: &LkIn) -> Key {
    Key { node, owner: asked.owner, flock: asked.lk_flags & LK_FLOCK != 0 }
}

fn is_held(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}

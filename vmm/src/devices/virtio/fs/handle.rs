//! Open files and directories of the guest.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::descriptor::Descriptor;
use super::host::error;
use super::node::Node;
use crate::sync::lock;

/// An open file or directory.
pub(super) struct Handle {
    pub(super) node: Arc<Node>,
    pub(super) file: Arc<Descriptor>,
    /// The flags of the host's open.
    pub(super) flags: i32,
    /// Descriptor of the same file, with the opposite `O_APPEND`.
    append_twin: Mutex<Option<Arc<Descriptor>>>,
    /// True after a request for a lock through the handle.
    locked: AtomicBool,
    /// Lock of the directory's position.
    position: Mutex<()>,
}

impl Handle {
    pub(super) fn new(node: Arc<Node>, file: Arc<Descriptor>, flags: i32) -> Self {
        node.add_handle();
        let (append_twin, position) = (Mutex::default(), Mutex::default());
        Self { node, file, flags, append_twin, locked: AtomicBool::new(false), position }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(super) fn appends(&self) -> bool {
        self.flags & libc::O_APPEND != 0
    }

    pub(super) fn note_lock(&self) {
        self.locked.store(true, Ordering::Relaxed);
    }

    pub(super) fn had_locks(&self) -> bool {
        self.locked.load(Ordering::Relaxed)
    }

    /// Locks the position of the directory, for one listing at a time.
    pub(super) fn position(&self) -> MutexGuard<'_, ()> {
        lock(&self.position)
    }

    /// Returns the file with the opposite `O_APPEND`, opened by `open` at the first call. A change
    /// of the handle's own flags would change them for running requests.
    pub(super) fn append_twin(
        &self,
        open: impl FnOnce(i32) -> io::Result<Descriptor>,
    ) -> io::Result<Arc<Descriptor>> {
        if let Some(twin) = &*lock(&self.append_twin) {
            return Ok(Arc::clone(twin));
        }
        let once = libc::O_TRUNC | libc::O_EXCL;
        let fresh = open((self.flags & !once) ^ libc::O_APPEND)?;
        Ok(Arc::clone(lock(&self.append_twin).get_or_insert_with(|| Arc::new(fresh))))
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // A descriptor open for writing would keep programs from being executed.
        self.node.part_with(&self.file, None);
        self.node.remove_handle();
    }
}

/// The handles, by number.
#[derive(Default)]
pub(super) struct HandleTable {
    handles: Mutex<HashMap<u64, Arc<Handle>>>,
    last: AtomicU64,
}

impl HandleTable {
    /// Adds a handle. Returns its number.
    pub(super) fn add(&self, handle: Handle) -> u64 {
        let number = 1 + self.last.fetch_add(1, Ordering::Relaxed);
        lock(&self.handles).insert(number, Arc::new(handle));
        number
    }

    /// Returns the handle, which must belong to `node` (`EBADF`).
    pub(super) fn get(&self, number: u64, node: u64) -> io::Result<Arc<Handle>> {
        let handles = lock(&self.handles);
        let handle = handles.get(&number).filter(|handle| handle.node.id == node);
        handle.cloned().ok_or_else(no_handle)
    }

    /// Removes and returns the handle, which must belong to `node` (`EBADF`).
    pub(super) fn take(&self, number: u64, node: u64) -> io::Result<Arc<Handle>> {
        let mut handles = lock(&self.handles);
        if handles.get(&number).is_none_or(|handle| handle.node.id != node) {
            return Err(no_handle());
        }
        handles.remove(&number).ok_or_else(no_handle)
    }

    /// Removes all handles.
    pub(super) fn take_all(&self) {
        let gone = std::mem::take(&mut *lock(&self.handles));
        drop(gone);
    }
}

fn no_handle() -> io::Error {
    error(libc::EBADF)
}

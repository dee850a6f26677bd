//! File descriptors of the guest's files, bounded in number.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Number of descriptors that may be open at once.
pub(super) struct Budget {
    max: AtomicUsize,
    used: Arc<AtomicUsize>,
}

/// The right to one descriptor, given back on drop.
pub(super) struct Slot(Arc<AtomicUsize>);

/// A descriptor that occupies a slot.
pub(super) struct Descriptor {
    fd: OwnedFd,
    _slot: Slot,
}

impl Budget {
    pub(super) fn new(max: usize) -> Self {
        Self { max: AtomicUsize::new(max), used: Arc::default() }
    }

    /// Takes a slot, if one is left.
    pub(super) fn take(&self) -> Option<Slot> {
        let max = self.max();
        let more = |used: usize| (used < max).then_some(used + 1);
        let order = Ordering::Relaxed;
        self.used.fetch_update(order, order, more).ok().map(|_| Slot(Arc::clone(&self.used)))
    }

    pub(super) fn max(&self) -> usize {
        self.max.load(Ordering::Relaxed)
    }

    /// Lowers the bound to `max`, if it is higher.
    pub(super) fn lower(&self, max: usize) {
        self.max.fetch_min(max, Ordering::Relaxed);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Slot {
    /// Puts a descriptor into the slot.
    pub(super) fn hold(self, fd: OwnedFd) -> Descriptor {
        Descriptor { fd, _slot: self }
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

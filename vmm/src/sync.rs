//! Locks whose data stays good when a thread that held one panicked.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`, also after a panic: whatever is behind a lock in this crate is whole between any
/// two statements, and a vCPU or the main thread must not end because a worker did.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

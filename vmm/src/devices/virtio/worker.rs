//! Threads that serve the queues of a device, and how they are stopped.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Stack of a worker thread. Most of it is never touched.
const STACK_SIZE: usize = 256 * 1024;

/// Tells workers to end.
pub struct Stop {
    event: EventFd,
    given: AtomicBool,
}

impl Stop {
    /// It is time to end. To be asked before each request: a guest can keep a queue from ever
    /// being empty.
    pub fn is_given(&self) -> bool {
        self.given.load(Ordering::Acquire)
    }

    /// Becomes readable with the stop, and is not to be read: it is the same for all.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

/// The running workers of a device. Dropping it stops and joins them.
pub struct Workers {
    stop: Arc<Stop>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts `run` on one thread of this name.
    ///
    /// # Errors
    ///
    /// When the host gives no thread or descriptor.
    pub fn spawn_one(name: &str, run: impl FnOnce(&Stop) + Send + 'static) -> io::Result<Self> {
        let mut workers = Self::none()?;
        workers.spawn(name, run)?;
        Ok(workers)
    }

    /// No worker yet.
    ///
    /// # Errors
    ///
    /// When the host gives no descriptor.
    pub fn none() -> io::Result<Self> {
        let stop = Stop { event: EventFd::new(EFD_NONBLOCK)?, given: AtomicBool::new(false) };
        Ok(Self { stop: Arc::new(stop), threads: Vec::new() })
    }

    /// Starts `run` on a thread of this name. It has to return soon after the stop is given.
    ///
    /// # Errors
    ///
    /// When the host gives no thread.
    pub fn spawn(
        &mut self,
        name: &str,
        run: impl FnOnce(&Stop) + Send + 'static,
    ) -> io::Result<()> {
        let stop = Arc::clone(&self.stop);
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .stack_size(STACK_SIZE)
            .spawn(move || run(&stop))?;
        self.threads.push(thread);
        Ok(())
    }
}

/// Waits until one of `kicks` is readable, and reads those that are. Returns false on the stop.
pub fn wait_for_work(stop: &Stop, kicks: &[&EventFd]) -> bool {
    let mut fds: Vec<PollFd<'_>> = std::iter::once(&stop.event)
        .chain(kicks.iter().copied())
        .map(|event| PollFd::new(borrow(event), PollFlags::POLLIN))
        .collect();
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
    for (kick, fd) in kicks.iter().zip(&fds[1..]) {
        if fd.any() == Some(true) {
            // Another thread may have read it first.
            let _ = kick.read();
        }
    }
    !stop.is_given()
}

pub(super) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is the eventfd's, which outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.given.store(true, Ordering::Release);
        // A full counter is readable as well.
        let _ = self.stop.event.write(1);
        for thread in self.threads.drain(..) {
            // A worker that panicked has ended, which is all that is wanted here.
            let _ = thread.join();
        }
    }
}

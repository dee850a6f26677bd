//! Threads that serve the queues of a device, and how they are stopped.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::thread::{self, JoinHandle};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Stack of a worker thread. Most of it is never touched.
const STACK_SIZE: usize = 256 * 1024;

/// The running workers of a device. Dropping it stops and joins them.
pub struct Workers {
    stop: EventFd,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts `run` on one thread of this name.
    ///
    /// # Errors
    ///
    /// When the host gives no thread or descriptor.
    pub fn spawn_one(name: &str, run: impl FnOnce(EventFd) + Send + 'static) -> io::Result<Self> {
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
        Ok(Self { stop: EventFd::new(EFD_NONBLOCK)?, threads: Vec::new() })
    }

    /// Starts `run` on a thread of this name. It has to return soon after the eventfd that it is
    /// given becomes readable, and must not read it: it is the same for all.
    ///
    /// # Errors
    ///
    /// When the host gives no thread or descriptor.
    pub fn spawn(
        &mut self,
        name: &str,
        run: impl FnOnce(EventFd) + Send + 'static,
    ) -> io::Result<()> {
        let stop = self.stop.try_clone()?;
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .stack_size(STACK_SIZE)
            .spawn(move || run(stop))?;
        self.threads.push(thread);
        Ok(())
    }
}

/// Waits until one of `events` is readable. Returns false when the first, the stop, is.
pub fn wait_for_work(events: &[&EventFd]) -> bool {
    let mut fds: Vec<PollFd<'_>> =
        events.iter().map(|event| PollFd::new(borrow(event), PollFlags::POLLIN)).collect();
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
    for (event, fd) in events.iter().zip(&fds).skip(1) {
        if fd.any() == Some(true) {
            // Another thread may have read it first.
            let _ = event.read();
        }
    }
    fds.first().is_some_and(|stop| stop.any() == Some(false))
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is the eventfd's, which outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // A full counter is readable as well.
        let _ = self.stop.write(1);
        for thread in self.threads.drain(..) {
            // A worker that panicked has ended, which is all that is wanted here.
            let _ = thread.join();
        }
    }
}

//! Threads that serve the queues of a device, and their stop.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::end::EndSignal;

/// Stack size of a worker thread in bytes. Most of the stack is never touched.
const STACK_SIZE: usize = 256 * 1024;

/// The stop signal of workers. A worker that cannot go on reports its failure here.
pub struct Stop {
    event: EventFd,
    given: AtomicBool,
    end: Arc<EndSignal>,
}

impl Stop {
    fn new(end: Arc<EndSignal>) -> io::Result<Arc<Self>> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        Ok(Arc::new(Self { event, given: AtomicBool::new(false), end }))
    }

    /// Returns true when the worker must end. Workers ask before each request, because a guest can
    /// keep a queue from ever being empty.
    pub fn is_given(&self) -> bool {
        self.given.load(Ordering::Acquire)
    }

    /// Returns an eventfd that becomes readable with the stop. Workers must not read it, because
    /// all workers of a device share it.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Stops the calling worker and the others of its device, and ends the microVM with this
    /// reason. A device that stays silent would look like a guest that hangs.
    pub fn fail(&self, message: String) {
        self.end.fail(message);
        self.give();
    }

    fn give(&self) {
        self.given.store(true, Ordering::Release);
        // A full counter is readable as well.
        let _ = self.event.write(1);
    }
}

/// The running workers of a device. Dropping the value stops and joins them.
pub struct Workers {
    stop: Arc<Stop>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Creates a set without workers. A worker that fails ends the microVM through `end`.
    pub fn telling(end: Arc<EndSignal>) -> io::Result<Self> {
        Ok(Self { stop: Stop::new(end)?, threads: Vec::new() })
    }

    /// Starts `run` on a thread with this name. `run` must return soon after the stop.
    pub fn spawn(
        &mut self,
        name: &str,
        run: impl FnOnce(&Stop) + Send + 'static,
    ) -> io::Result<()> {
        let stop = Arc::clone(&self.stop);
        self.threads.push(spawn(name, move || run(&stop))?);
        Ok(())
    }
}

/// A server of a device, apart from the vCPUs, that can be stopped for a while.
pub trait Hold {
    /// Stops the server. After the return it touches neither guest memory nor queues.
    fn hold(&mut self);

    /// Continues where the server was stopped.
    ///
    /// # Errors
    ///
    /// When no thread or descriptor can be made. The server then serves no more.
    fn resume(&mut self) -> io::Result<()>;
}

/// A thread that serves a device and can be held. While it is held, its work can be read here.
/// Dropping the value stops and joins the thread.
pub struct Worker<T> {
    name: &'static str,
    run: fn(&mut T, &Stop),
    end: Arc<EndSignal>,
    /// The work, while there is no thread.
    held: Option<T>,
    thread: Option<(Arc<Stop>, JoinHandle<T>)>,
}

impl<T: Send + 'static> Worker<T> {
    /// Creates a held worker, which calls `run` on a thread with this name. `run` must return soon
    /// after the stop, and look for work before it first waits.
    pub fn new(name: &'static str, work: T, end: Arc<EndSignal>, run: fn(&mut T, &Stop)) -> Self {
        Self { name, run, end, held: Some(work), thread: None }
    }

    /// Creates and starts a worker.
    pub fn start(
        name: &'static str,
        work: T,
        end: Arc<EndSignal>,
        run: fn(&mut T, &Stop),
    ) -> io::Result<Self> {
        let mut worker = Self::new(name, work, end, run);
        worker.resume()?;
        Ok(worker)
    }

    /// Returns the work of a held worker.
    pub fn held(&self) -> Option<&T> {
        self.held.as_ref()
    }
}

impl<T: Send + 'static> Hold for Worker<T> {
    /// Ends the thread, and waits until it has ended.
    fn hold(&mut self) {
        if let Some((stop, thread)) = self.thread.take() {
            stop.give();
            // The work of a worker that panicked is lost.
            self.held = thread.join().ok();
        }
    }

    fn resume(&mut self) -> io::Result<()> {
        let Some(mut work) = self.held.take() else { return Ok(()) };
        let stop = Stop::new(Arc::clone(&self.end))?;
        let (theirs, run) = (Arc::clone(&stop), self.run);
        let thread = spawn(self.name, move || {
            run(&mut work, &theirs);
            work
        })?;
        self.thread = Some((stop, thread));
        Ok(())
    }
}

impl<T> Drop for Worker<T> {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.thread.take() {
            stop.give();
            let _ = thread.join();
        }
    }
}

fn spawn<T: Send + 'static>(
    name: &str,
    run: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    thread::Builder::new().name(name.to_owned()).stack_size(STACK_SIZE).spawn(run)
}

/// Waits until one of `kicks` is readable, and reads those that are. False on the stop, which a
/// failed wait gives as well.
pub fn wait_for_work(stop: &Stop, kicks: &[&EventFd]) -> bool {
    for (kick, fd) in kicks.iter().zip(&wait(stop, kicks)[1..]) {
        if fd.any() == Some(true) {
            // Another thread may have read the kick first.
            let _ = kick.read();
        }
    }
    !stop.is_given()
}

/// Waits as [`wait_for_work`] does, but reads no kick.
pub fn wait_for_kick(stop: &Stop, kicks: &[&EventFd]) -> bool {
    wait(stop, kicks);
    !stop.is_given()
}

/// Waits for `time` or for the stop. False on the stop, which a failed wait gives as well.
pub fn wait_some(stop: &Stop, time: Duration) -> bool {
    let mut fds = [PollFd::new(borrow(&stop.event), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX);
    match poll(&mut fds, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(e) => stop.fail(format!("a device cannot wait: poll: {e}")),
    }
    !stop.is_given()
}

/// Waits for the stop or for one of `kicks`. Returns both in this order, with the results of
/// poll(2).
fn wait<'a>(stop: &'a Stop, kicks: &[&'a EventFd]) -> Vec<PollFd<'a>> {
    let mut fds: Vec<PollFd<'_>> = std::iter::once(&stop.event)
        .chain(kicks.iter().copied())
        .map(|event| PollFd::new(borrow(event), PollFlags::POLLIN))
        .collect();
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => return fds,
            Err(Errno::EINTR) => {}
            Err(e) => {
                stop.fail(format!("a device cannot wait for its queues: poll: {e}"));
                return fds;
            }
        }
    }
}

pub(super) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor belongs to the eventfd, which outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.give();
        for thread in self.threads.drain(..) {
            // A worker that panicked has ended, as required here.
            let _ = thread.join();
        }
    }
}

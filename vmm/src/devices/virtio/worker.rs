//! Threads that serve the queues of a device, and how they are stopped.

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

/// Stack of a worker thread. Most of it is never touched.
const STACK_SIZE: usize = 256 * 1024;

/// Tells workers to end, and takes their word when they cannot go on.
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

    /// It is time to end. To be asked before each request: a guest can keep a queue from ever
    /// being empty.
    pub fn is_given(&self) -> bool {
        self.given.load(Ordering::Acquire)
    }

    /// Becomes readable with the stop, and is not to be read: it is the same for all.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// The calling worker cannot go on. Stops it and its like, and ends the microVM with this
    /// reason: a device that is silent for ever would look like a guest that hangs.
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

/// The running workers of a device. Dropping it stops and joins them.
pub struct Workers {
    stop: Arc<Stop>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// No worker yet. One that fails ends the microVM, with `end`.
    ///
    /// # Errors
    ///
    /// When the host gives no descriptor.
    pub fn telling(end: Arc<EndSignal>) -> io::Result<Self> {
        Ok(Self { stop: Stop::new(end)?, threads: Vec::new() })
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
        self.threads.push(spawn(name, move || run(&stop))?);
        Ok(())
    }
}

/// What serves a device beside the vCPUs and can be stopped for a while.
pub trait Hold {
    /// Stops it. When it returns, nothing of it touches guest memory or queues.
    fn hold(&mut self);

    /// Lets it go on where it was.
    ///
    /// # Errors
    ///
    /// When the host gives no thread or descriptor; then it serves no more.
    fn resume(&mut self) -> io::Result<()>;
}

/// One thread that serves a device and can be held: then what it works on is here to be looked at,
/// and it goes on later. Dropping it stops and joins the thread.
pub struct Worker<T> {
    name: &'static str,
    run: fn(&mut T, &Stop),
    end: Arc<EndSignal>,
    /// What the thread works on, while there is no thread.
    held: Option<T>,
    thread: Option<(Arc<Stop>, JoinHandle<T>)>,
}

impl<T: Send + 'static> Worker<T> {
    /// Is to do `run` on a thread of this name, and held for now. `run` has to return soon after the
    /// stop is given, and to look for work before it first waits for some.
    pub fn new(name: &'static str, work: T, end: Arc<EndSignal>, run: fn(&mut T, &Stop)) -> Self {
        Self { name, run, end, held: Some(work), thread: None }
    }

    /// The same, started.
    ///
    /// # Errors
    ///
    /// When the host gives no thread or descriptor.
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

    /// What the thread worked on, if it is held.
    pub fn held(&self) -> Option<&T> {
        self.held.as_ref()
    }
}

impl<T: Send + 'static> Hold for Worker<T> {
    /// Ends the thread, and returns when it has ended.
    fn hold(&mut self) {
        if let Some((stop, thread)) = self.thread.take() {
            stop.give();
            // What a worker that panicked worked on is gone with it.
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

/// Waits until one of `kicks` is readable, and reads those that are. Returns false on the stop, which
/// a failure to wait gives as well.
pub fn wait_for_work(stop: &Stop, kicks: &[&EventFd]) -> bool {
    for (kick, fd) in kicks.iter().zip(&wait(stop, kicks)[1..]) {
        if fd.any() == Some(true) {
            // Another thread may have read it first.
            let _ = kick.read();
        }
    }
    !stop.is_given()
}

/// The same, but leaves what can be read.
pub fn wait_for_kick(stop: &Stop, kicks: &[&EventFd]) -> bool {
    wait(stop, kicks);
    !stop.is_given()
}

/// Waits for `time`, or for the stop. Returns false on the stop, which a failure to wait gives as well.
pub fn wait_some(stop: &Stop, time: Duration) -> bool {
    let mut fds = [PollFd::new(borrow(&stop.event), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX);
    match poll(&mut fds, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(e) => stop.fail(format!("a device cannot wait: poll: {e}")),
    }
    !stop.is_given()
}

/// Waits for the stop or one of `kicks`, and returns them in this order as poll(2) has left them.
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
    // SAFETY: the descriptor is the eventfd's, which outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.give();
        for thread in self.threads.drain(..) {
            // A worker that panicked has ended, which is all that is wanted here.
            let _ = thread.join();
        }
    }
}

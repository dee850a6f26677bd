//! Requests that wait for a lock. Each waits in a thread of its own, so that no worker is held up.
//! The number of threads is bounded.

use std::collections::VecDeque;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::host::error;
use super::lock::Wait;
use crate::sync::lock;

/// Most requests that wait at once. Each takes at most three entries of the device's queue, which
/// needs room for others.
const MAX_WAITERS: usize = 128;

/// Most interrupts that are kept until their request comes. An interrupt can overtake its request.
const MAX_EARLY: usize = 64;

/// Stack size of a waiting thread in bytes.
const STACK_SIZE: usize = 64 * 1024;

/// Most signals that end a thread's wait. They are a millisecond apart.
const MAX_NUDGES: u32 = 2000;

/// The waiting requests.
pub(super) struct Waiters {
    list: Mutex<List>,
}

#[derive(Default)]
struct List {
    waiting: Vec<Waiter>,
    /// Requests that were interrupted before they came.
    early: VecDeque<u64>,
    ended: bool,
}

struct Waiter {
    unique: u64,
    cancelled: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Waiters {
    /// Creates an empty list. Fails if the process cannot handle the signal.
    pub(super) fn new() -> io::Result<Self> {
        // The signal only interrupts a system call.
        extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(nudge_signal(), nothing)
            .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        Ok(Self { list: Mutex::default() })
    }

    /// Waits for a lock in a thread, and passes the result to `answer`. After a lock `settle`
    /// returns true if the wait must be repeated.
    ///
    /// `ENOLCK` if too many requests wait. `EINTR` if the request was interrupted already. `answer`
    /// is not called then.
    pub(super) fn start(
        &self,
        unique: u64,
        mut wait: Wait,
        settle: impl Fn(&mut Wait) -> io::Result<bool> + Send + 'static,
        answer: impl FnOnce(io::Result<()>) + Send + 'static,
    ) -> io::Result<()> {
        let mut list = lock(&self.list);
        list.waiting.retain(|waiter| !waiter.thread.is_finished());
        if let Some(at) = list.early.iter().position(|early| *early == unique) {
            list.early.remove(at);
            return Err(error(libc::EINTR));
        }
        if list.ended || list.waiting.len() >= MAX_WAITERS {
            return Err(error(libc::ENOLCK));
        }
        let cancelled = Arc::new(AtomicBool::new(false));
        let theirs = Arc::clone(&cancelled);
        let run = move || {
            let result = loop {
                if theirs.load(Ordering::Acquire) {
                    break Err(error(libc::EINTR));
                }
                match wait.block().and_then(|()| settle(&mut wait)) {
                    Ok(true) => {}
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    result => break result.map(drop),
                }
            };
            answer(result);
        };
        let builder = thread::Builder::new().name("fs-lock".to_owned()).stack_size(STACK_SIZE);
        let thread = builder.spawn(run).map_err(|_| error(libc::ENOLCK))?;
        list.waiting.push(Waiter { unique, cancelled, thread });
        Ok(())
    }

    /// Ends the wait of a request. The answer is `EINTR`, unless the request has just got its lock.
    pub(super) fn interrupt(&self, unique: u64) {
        let mut list = lock(&self.list);
        match list.waiting.iter().find(|waiter| waiter.unique == unique) {
            Some(waiter) => waiter.cancel(),
            None => {
                if list.early.len() >= MAX_EARLY {
                    list.early.pop_front();
                }
                list.early.push_back(unique);
            }
        }
    }

    /// Ends all waits. Returns when no thread is left.
    pub(super) fn end(&self) {
        let mut list = lock(&self.list);
        list.ended = true;
        for waiter in list.waiting.drain(..) {
            waiter.cancel();
            let _ = waiter.thread.join();
        }
    }
}

impl Waiter {
    /// Signals the thread until it has ended. A signal just before the wait is lost, so one signal
    /// is not enough.
    fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        for _ in 0..MAX_NUDGES {
            if self.thread.is_finished() {
                break;
            }
            // SAFETY: the thread has not been joined, so its handle is valid.
            unsafe { libc::pthread_kill(self.thread.as_pthread_t(), nudge_signal()) };
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Returns the signal after that of the vCPUs.
fn nudge_signal() -> libc::c_int {
    SIGRTMIN() + 1
}

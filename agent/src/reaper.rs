//! Waits for every child of PID 1, its own and the orphans it inherits.
//!
//! There is one `wait` loop and nothing else in the agent waits for processes, so no exit status
//! can be taken by the wrong reader. A process is registered under the same lock that the loop
//! holds, so that one that ends at once is not mistaken for an orphan.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::{WaitOptions, WaitStatus};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::error::{Context as _, Result};
use crate::log::log_error;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// What it passed to `exit`, or 128 + n when signal n ended it.
    pub(crate) status: u32,
    /// The signal that ended it, or 0.
    pub(crate) signal: u32,
}

/// Becomes `Some` when the process has ended.
pub(crate) type ExitReceiver = watch::Receiver<Option<Exit>>;

/// The processes that somebody waits for, by pid.
#[derive(Default)]
pub(crate) struct Reaper {
    waiters: Mutex<HashMap<i32, watch::Sender<Option<Exit>>>>,
}

impl Reaper {
    /// Starts a process and registers it. `start` returns its pid and is called under the lock, so
    /// it has to be brief.
    pub(crate) fn spawn<T>(
        &self,
        start: impl FnOnce() -> io::Result<(i32, T)>,
    ) -> io::Result<(i32, T, ExitReceiver)> {
        let mut waiters = self.lock();
        let (pid, value) = start()?;
        let (sender, receiver) = watch::channel(None);
        waiters.insert(pid, sender);
        Ok((pid, value, receiver))
    }

    /// Reaps for as long as the agent lives.
    ///
    /// # Errors
    ///
    /// The handler for SIGCHLD cannot be installed.
    pub(crate) fn run(self: &Arc<Self>) -> Result<()> {
        let mut children = signal(SignalKind::child()).context(|| "handle SIGCHLD")?;
        let reaper = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                reaper.reap();
                if children.recv().await.is_none() {
                    log_error!("the runtime no longer delivers SIGCHLD");
                    return;
                }
            }
        });
        Ok(())
    }

    fn reap(&self) {
        loop {
            let mut waiters = self.lock();
            // ECHILD and "none has ended" both mean that there is nothing to do now.
            let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) else {
                return;
            };
            if let Some(waiter) = waiters.remove(&pid.as_raw_nonzero().get()) {
                waiter.send_replace(Some(exit_of(status)));
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<i32, watch::Sender<Option<Exit>>>> {
        self.waiters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn exit_of(status: WaitStatus) -> Exit {
    if let Some(signal) = status.terminating_signal() {
        let signal = signal.unsigned_abs();
        return Exit { status: 128 + signal, signal };
    }
    Exit { status: status.exit_status().unwrap_or_default().unsigned_abs(), signal: 0 }
}

/// Waits until the process has ended.
pub(crate) async fn exited(receiver: &mut ExitReceiver) -> Exit {
    match receiver.wait_for(Option::is_some).await.map(|exit| *exit) {
        Ok(Some(exit)) => exit,
        // The sender only goes away after it has sent; a lost one must not become a success.
        _ => Exit { status: 255, signal: 0 },
    }
}

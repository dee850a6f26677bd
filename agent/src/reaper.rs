//! Waits for every child of PID 1: its own, and the orphans that it inherits.
//!
//! Only this loop waits for processes in the agent, so no other reader can take an exit status. The
//! lock that the loop holds also covers the registration of a process. So a process that ends at
//! once is not mistaken for an orphan.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::{WaitOptions, WaitStatus};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::error::{Context as _, Result};
use crate::log::log_error;

/// The end of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Argument of `exit`, or 128 + n if signal n ended the process.
    pub(crate) status: u32,
    /// The signal that ended the process, or 0.
    pub(crate) signal: u32,
}

/// Becomes `Some` when the process has ended.
pub(crate) type ExitReceiver = watch::Receiver<Option<Exit>>;

/// The processes with a waiter, by pid.
#[derive(Default)]
pub(crate) struct Reaper {
    waiters: Mutex<HashMap<i32, watch::Sender<Option<Exit>>>>,
}

impl Reaper {
    /// Starts a process and registers it. `start` returns the pid, and has to be brief because it
    /// runs under the lock.
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
            // ECHILD, and no ended child, both mean that there is nothing to do now.
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
        // The sender goes away only after it has sent. A lost sender must not look like a success.
        _ => Exit { status: 255, signal: 0 },
    }
}

//! One process that the agent has started in a container.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use super::cgroup::Cgroup;
use super::channel::Channel;
use super::launch::{self, Launched};
use super::signals::MAX_SIGNAL;
use super::stdio::{Connected, Connections, Pipes};
use super::terminal::{self, Size};
use crate::error::{Code, Context as _, Error, Result};
use crate::pump::{Late, Written};
use crate::reaper::{Exit, ExitReceiver, exited};

/// A process, from the moment that it is ready to call `execve`.
pub(crate) struct Process {
    pid: i32,
    pidfd: OwnedFd,
    exit: ExitReceiver,
    streams: Connected,
    /// Channel to the process, taken by the call that starts it.
    channel: Mutex<Option<Channel>>,
    cgroup: Arc<Cgroup>,
    oom_kills_before: u64,
    end: OnceLock<Ended>,
}

/// The end of a process.
#[derive(Debug, Clone)]
pub(crate) struct Ended {
    pub(crate) exit: Exit,
    /// The kernel has killed a process of the container for its memory limit since this process
    /// started.
    pub(crate) oom_killed: bool,
    /// Bytes written to each of the process's outputs before its end.
    pub(crate) written: Vec<u64>,
}

impl Process {
    /// Takes over a process that is ready, and connects its streams.
    pub(crate) fn new(
        launched: Launched,
        cgroup: Arc<Cgroup>,
        oom_kills_before: u64,
        pipes: Pipes,
        connections: Connections,
        late: Late,
    ) -> Result<Self> {
        let Launched { pid, pidfd, channel, exit, terminal } = launched;
        let streams = pipes.connect(connections, terminal, late, &exit)?;
        let channel = Mutex::new(Some(channel));
        let end = OnceLock::new();
        Ok(Self { pid, pidfd, exit, streams, channel, cgroup, oom_kills_before, end })
    }

    /// Pid in the guest's root pid namespace.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    pub(crate) fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.exit.borrow().is_some()
    }

    /// Waits until the process has ended.
    pub(crate) async fn wait(&self) -> &Ended {
        let exit = exited(&mut self.exit.clone()).await;
        self.end.get_or_init(|| Ended {
            exit,
            oom_killed: self.cgroup.oom_kills() > self.oom_kills_before,
            written: self.streams.written.iter().map(Written::bytes).collect(),
        })
    }

    /// Lets the process call `execve`. A second call is an error.
    pub(crate) async fn start(self: &Arc<Self>) -> Result<()> {
        let channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner).take();
        let channel =
            channel.ok_or_else(|| Error::state("the process has been started already"))?;
        let process = Arc::clone(self);
        tokio::task::spawn_blocking(move || launch::start(&channel, &process.pidfd))
            .await
            .map_err(|e| Error::internal(e.to_string()))?
    }

    /// Sends a signal. A process that has ended is an error.
    pub(crate) fn signal(&self, signal: u32) -> Result<()> {
        let signal = signal_number(signal)?;
        let sent = crate::syscall::pidfd_send_signal(self.pidfd.as_fd(), signal);
        match sent {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {
                Err(Error::state("the process has already ended"))
            }
            sent => sent.context(|| format!("send signal {signal} to process {}", self.pid)),
        }
    }

    /// Changes the size of the process's terminal.
    pub(crate) fn resize(&self, size: Size) -> Result<()> {
        match self.streams.terminal.as_ref().map(Weak::upgrade) {
            Some(Some(terminal)) => terminal::resize(terminal.get_ref(), size),
            Some(None) => Err(Error::state("the terminal of the process has been hung up")),
            None => Err(Error::state("the process has no terminal")),
        }
    }
}

/// Checks a signal number.
pub(crate) fn signal_number(signal: u32) -> Result<i32> {
    match i32::try_from(signal) {
        Ok(signal) if (1..=MAX_SIGNAL).contains(&signal) => Ok(signal),
        _ => Err(Error::new(Code::InvalidArgument, format!("there is no signal {signal}"))),
    }
}

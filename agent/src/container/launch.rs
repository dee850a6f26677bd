//! Starts the agent's program as a container's process, and brings it up to the point just before
//! `execve`.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use rustix::process::Pid;

use super::cgroup::Cgroup;
use super::channel::{self, Channel, InitRequest, Tag};
use super::clone::{Parent, clone_process, kill};
use super::rlimits;
use crate::error::{Context as _, Error, Result};
use crate::oci::{NamespaceKind, PosixRlimit};
use crate::reaper::{ExitReceiver, Reaper};

/// Longest time for one step of a process towards `execve`. The process is already in the
/// container, where a signal from another process or an unresponsive file system can stop it for
/// ever.
pub(crate) const STEP_TIMEOUT: Duration = Duration::from_secs(60);

/// Properties of a new process that the agent has to apply from outside.
pub(crate) struct Launch<'a> {
    /// Longest time for one step, hooks included. `None` if the hooks have no limit.
    pub(crate) step_timeout: Option<Duration>,
    pub(crate) parent: Parent<'a>,
    pub(crate) cgroup: &'a Cgroup,
    pub(crate) request: InitRequest,
    pub(crate) document: &'a [u8],
    /// Standard input, output and error, unless there is a terminal, and the descriptors from 3 on.
    pub(crate) streams: Vec<OwnedFd>,
    pub(crate) oom_score_adj: i32,
    pub(crate) rlimits: &'a [PosixRlimit],
}

/// A process that is ready to call `execve`.
#[derive(Debug)]
pub(crate) struct Launched {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    pub(crate) channel: Channel,
    pub(crate) exit: ExitReceiver,
    /// The master side of the process's terminal.
    pub(crate) terminal: Option<OwnedFd>,
}

/// Starts a process and waits until it is ready. Blocks during the set-up.
///
/// An error is the process's own, if it has reported one. The process is dead then.
pub(crate) fn launch(reaper: &Reaper, launch: Launch<'_>) -> Result<Launched> {
    let (channel, theirs) = Channel::pair(launch.step_timeout).context(|| "make a socket pair")?;
    let (pid, pidfd, exit) = clone_process(reaper, &launch.parent, launch.cgroup, &theirs)?;
    drop(theirs);
    let mut launched = Launched { pid, pidfd, channel, exit, terminal: None };
    match configure(&mut launched, launch) {
        Ok(()) => Ok(launched),
        Err(e) => {
            // The process may still be running; the reaper collects it in either case.
            kill(&launched.pidfd);
            Err(e)
        }
    }
}

fn configure(launched: &mut Launched, launch: Launch<'_>) -> Result<()> {
    // The process applies its sysctls after the request below, and they may name these interfaces.
    if let Parent::New { network: Some(network), .. } = &launch.parent {
        crate::network::set_up(network, launched.pid, &launched.pidfd)?;
    }
    let adj = format!("/proc/{}/oom_score_adj", launched.pid);
    match fs::write(&adj, launch.oom_score_adj.to_string()) {
        // The process has ended; the channel below delivers the reason.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {}
        written => {
            written.context(|| format!("set process.oomScoreAdj {}", launch.oom_score_adj))?;
        }
    }
    let request =
        serde_json::to_vec(&launch.request).map_err(|e| Error::internal(e.to_string()))?;
    let mut fds = Vec::with_capacity(1 + launch.streams.len());
    if let Parent::Join { init, .. } = launch.parent {
        fds.push(init);
    }
    fds.extend(launch.streams.iter().map(|fd| fd.as_fd()));
    let channel = &launched.channel;
    let sent = channel
        .send(Tag::Request, &request, &fds)
        .and_then(|()| channel.send(Tag::Document, launch.document, &[]));
    // A process that stopped reading has reported the reason, which is read below.
    if let Err(e) = sent
        && !is_gone(&e)
    {
        return Err(no_answer(e, "send the specification to the new process"));
    }
    drop(launch.streams);
    launched.terminal = wait_until_ready(channel)?;
    // A process in a user namespace has no right to raise limits; any other process does it itself.
    if launch.parent.namespaces().has(NamespaceKind::User) {
        rlimits::set(Pid::from_raw(launched.pid), launch.rlimits)?;
    }
    Ok(())
}

/// Waits until the process is ready. Returns the terminal that it has opened, if any.
fn wait_until_ready(channel: &Channel) -> Result<Option<OwnedFd>> {
    let mut terminal = None;
    loop {
        let message = channel.receive().map_err(|e| no_answer(e, "read from the new process"))?;
        let Some(message) = message else {
            let why = "the process was killed while it was being set up (is the memory limit large \
                       enough?)";
            return Err(Error::internal(why));
        };
        match message.tag {
            Tag::Terminal if terminal.is_none() => terminal = message.fds.into_iter().next(),
            Tag::Ready => return Ok(terminal),
            Tag::Failed => return Err(failure(&message.payload)),
            tag => {
                return Err(Error::internal(format!("the new process sent {tag:?} out of order")));
            }
        }
    }
}

/// The error of a channel to a process. For a timeout it names the likely causes.
fn no_answer(e: io::Error, what: &str) -> Error {
    if !channel::timed_out(&e) {
        return Error::internal(format!("{what}: {}", crate::error::reason(&e)));
    }
    Error::internal(format!(
        "{what}: no answer in time (has a process of the container stopped it, or does a file system \
         of the container not answer?)"
    ))
}

/// The error that a process reported before it ended.
fn failure(json: &[u8]) -> Error {
    serde_json::from_slice(json).unwrap_or_else(|e| Error::internal(e.to_string()))
}

/// Lets a process call `execve` and waits for the outcome. Blocks. If `execve` fails, the process
/// is dead or about to exit.
pub(crate) fn start(channel: &Channel, pidfd: &OwnedFd) -> Result<()> {
    match channel.send(Tag::Start, &[], &[]) {
        Err(e) if is_gone(&e) => Err(Error::state("the process has ended before it was started")),
        sent => match sent.and_then(|()| channel.receive()) {
            // execve has closed the channel, or a signal came first, which the exit status will
            // tell.
            Ok(None) => Ok(()),
            Ok(Some(message)) => Err(failure(&message.payload)),
            Err(e) => {
                kill(pidfd);
                Err(no_answer(e, "start the process"))
            }
        },
    }
}

/// Returns true for the error of a channel whose other end is closed.
fn is_gone(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

//! The VMM process: its start, its watch, its end.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::process::{CommandExt, ExitStatusExt},
    },
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rustix::{
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType},
    process::{Pid, PidfdFlags, Signal},
};
use tokio::{
    io::{AsyncReadExt, unix::AsyncFd},
    net::unix::pipe,
    sync::{oneshot, watch},
    time::timeout,
};

use isopod_vmm::{
    config::VmConfig,
    control::{EndReason, MAX_MESSAGE_LEN, VmmAction, VmmEvent, VmmMessage, VmmReply},
};

use crate::{
    descriptor::{self, inherit_only, wait_for},
    error::{Error, ErrorKind, Explain, Result},
    exit_text::exit_text,
    figures::VmmFigures,
    microvm::{drop_caches::DropCaches, placement::Placement},
    process_id::ProcessId,
    signals,
    text::{printable, seconds},
    timeline::Timeline,
};

/// Longest time for a VMM to end after it has closed its control socket.
const LINGER: Duration = Duration::from_secs(5);

/// Longest time for a VMM to stop when it is asked to.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// Longest time for the VMM's figures.
const FIGURES_TIMEOUT: Duration = Duration::from_secs(3);

/// Longest time for the VMM to carry out an action.
const REPLY_TIMEOUT: Duration = Duration::from_secs(30);

/// Most bytes of the VMM's standard error to keep.
const MAX_STDERR_LEN: usize = 4096;

/// Most lines of the guest's console to repeat.
const MAX_TAIL_LINES: usize = 30;

/// A running VMM. Dropping it kills the process.
#[derive(Debug)]
pub(crate) struct Vmm {
    id: ProcessId,
    pidfd: Arc<AsyncFd<OwnedFd>>,
    control: Arc<AsyncFd<OwnedFd>>,
    replies: Replies,
    progress: watch::Receiver<Progress>,
    drop_caches: DropCaches,
}

/// Those who wait for the VMM's replies, in the order of their requests.
type Replies = Arc<Mutex<VecDeque<oneshot::Sender<VmmReply>>>>;

/// The progress of a VMM, as far as it is known.
#[derive(Debug, Clone, Default)]
struct Progress {
    started: Option<VmmEvent>,
    end: Option<VmmEnd>,
}

/// The end of a VMM.
#[derive(Debug, Clone, Default)]
pub(crate) struct VmmEnd {
    /// The reason that the VMM gave, if any.
    reason: Option<EndReason>,
    /// Reason why the VMM could not start the microVM.
    failure: Option<String>,
    /// The last lines of the guest's console.
    console_tail: Vec<String>,
    /// Exit of the process, in words.
    exit: String,
    /// True if SIGKILL ended it.
    killed: bool,
    /// The last lines of its standard error.
    stderr: Vec<String>,
}

impl Vmm {
    /// Starts the VMM `program` with `config`, and fills in its `control_fd`. The other descriptors
    /// must stay open until this returns.
    pub(crate) fn spawn(program: &Path, mut config: VmConfig, place: &Placement) -> Result<Self> {
        let what = || format!("cannot start the VMM {}", program.display());
        let (control, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .explain(what)?;
        config.control_fd = theirs.as_raw_fd();
        let document = config_file(&config)?;
        let mut inherited = config.descriptors();
        inherited.push(document.as_raw_fd());
        let own = rustix::process::getpid();
        let place = place.open()?;
        let mut command = Command::new(program);
        command
            .arg0("isopod-vmm")
            .arg("--config-fd")
            .arg(document.as_raw_fd().to_string())
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        // SAFETY: prctl, getppid, open, write, signal, setrlimit, close_range and fcntl are
        // async-signal-safe. What the closure uses was allocated before the fork: it allocates
        // nothing and takes no lock.
        unsafe {
            command.pre_exec(move || {
                // The VMM must not outlive the sandbox process, in whatever way that ends.
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                if rustix::process::getppid() != Some(own) {
                    return Err(io::Error::from(rustix::io::Errno::SRCH));
                }
                place.enter()?;
                // A signal to every process of the cgroup is for the container. The container's end
                // is also the end of the VMM.
                signals::ignore()?;
                inherit_only(&inherited)
            });
        }
        let child = command.spawn().explain(what)?;
        Self::watch(child, control).explain(what)
    }

    /// Has a task watch the process. If this is not possible, the process is ended.
    fn watch(mut child: Child, control: OwnedFd) -> io::Result<Self> {
        let prepare = |child: &mut Child| {
            let gone = || io::Error::other("it is gone already");
            let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
            // The child is not reaped before this process waits for it, so the pid is still its
            // own.
            let raw = Pid::from_raw(pid).ok_or_else(gone)?;
            let pidfd = wait_for(rustix::process::pidfd_open(raw, PidfdFlags::empty())?)?;
            let stderr = child.stderr.take().ok_or_else(gone)?;
            let stderr = pipe::Receiver::from_owned_fd(stderr.into())?;
            // A VMM that has failed at once has no start time any more, and needs none.
            let id = ProcessId::of(pid).unwrap_or(ProcessId { pid, start_time: 0 });
            Ok((id, Arc::new(pidfd), stderr, Arc::new(wait_for(control)?)))
        };
        let (id, pidfd, stderr, control) = match prepare(&mut child) {
            Ok(prepared) => prepared,
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(e);
            }
        };
        let (sender, progress) = watch::channel(Progress::default());
        let (watched, heard) = (Arc::clone(&pidfd), Arc::clone(&control));
        let drop_caches = DropCaches::default();
        let wishes = drop_caches.clone();
        let replies = Replies::default();
        let waiting = Arc::clone(&replies);
        let ears = Ears { progress: sender, replies: waiting, drop_caches: wishes };
        tokio::spawn(watch_process(child, watched, heard, stderr, ears));
        Ok(Self { id, pidfd, control, replies, progress, drop_caches })
    }

    /// The process of the VMM.
    pub(crate) fn id(&self) -> ProcessId {
        self.id
    }

    /// The wish that the guest forgets files. The VMM has it when the guest knows of many files.
    pub(crate) fn drop_caches(&self) -> DropCaches {
        self.drop_caches.clone()
    }

    /// Waits for the end of the VMM.
    pub(crate) async fn ended(&self) -> VmmEnd {
        let mut progress = self.progress.clone();
        match progress.wait_for(|progress| progress.end.is_some()).await {
            Ok(progress) => progress.end.clone().unwrap_or_default(),
            // Unreachable: the watching task cannot end before it has reported the VMM's end.
            Err(_) => VmmEnd::default(),
        }
    }

    /// Tells whether the VMM has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.progress.borrow().end.is_some()
    }

    /// Fills in the times that the VMM has reported.
    pub(crate) fn fill_timeline(&self, timeline: &mut Timeline) {
        if let Some(VmmEvent::Started { exec_us, running_us }) = self.progress.borrow().started {
            timeline.vmm_main = Some(exec_us);
            timeline.vcpus = Some(running_us);
        }
    }

    /// The VMM's figures about itself.
    ///
    /// # Errors
    ///
    /// If the VMM gives no answer.
    pub(crate) async fn figures(&self) -> Result<VmmFigures> {
        let reply = self.ask(&VmmAction::Status, None, FIGURES_TIMEOUT).await?;
        VmmFigures::of(reply).ok_or_else(|| Error::new("the VMM gives no figures of itself"))
    }

    /// Has the VMM carry out an action that has a reply. A descriptor may go with it.
    ///
    /// # Errors
    ///
    /// Of the kind [`ErrorKind::VmLost`] if the VMM is ending or does not answer.
    pub(crate) async fn request(
        &self,
        action: &VmmAction,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<VmmReply> {
        self.ask(action, descriptor, REPLY_TIMEOUT).await
    }

    async fn ask(
        &self,
        action: &VmmAction,
        descriptor: Option<BorrowedFd<'_>>,
        limit: Duration,
    ) -> Result<VmmReply> {
        let lost =
            |why: String| Error::with_kind(ErrorKind::VmLost, format!("cannot ask the VMM: {why}"));
        let message = serde_json::to_vec(action).map_err(|e| lost(e.to_string()))?;
        let (answer, answered) = oneshot::channel();
        {
            // Under the lock, so that replies come in the order of the queue.
            let mut replies = self.replies.lock().unwrap_or_else(PoisonError::into_inner);
            let control = self.control.get_ref();
            match descriptor {
                Some(descriptor) => descriptor::send(control, descriptor, &message),
                None => rustix::net::send(control, &message, SendFlags::NOSIGNAL)
                    .map(drop)
                    .map_err(Into::into),
            }
            .map_err(|e| lost(e.to_string()))?;
            replies.push_back(answer);
        }
        match timeout(limit, answered).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(_)) => Err(lost("it has ended".to_owned())),
            Err(_) => Err(lost(format!("no reply within {}", seconds(limit)))),
        }
    }

    /// Ends the microVM without telling the guest, and waits for the end of the VMM.
    pub(crate) async fn stop(&self) -> VmmEnd {
        if let Ok(action) = serde_json::to_vec(&VmmAction::Stop) {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            // If the request cannot be sent, the VMM is killed below.
            let _ = rustix::net::send(self.control.get_ref(), &action, flags);
        }
        if let Ok(end) = timeout(STOP_TIMEOUT, self.ended()).await {
            return end;
        }
        self.kill();
        self.ended().await
    }

    fn kill(&self) {
        // Fails if the VMM has ended already.
        let _ = rustix::process::pidfd_send_signal(self.pidfd.get_ref().as_fd(), Signal::KILL);
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.kill();
    }
}

impl VmmEnd {
    /// Returns true if the guest ended as it was asked to.
    pub(crate) fn is_shutdown(&self) -> bool {
        self.reason == Some(EndReason::GuestShutdown)
    }

    /// Returns true if the guest ended by itself, in order or not.
    pub(crate) fn is_of_the_guest(&self) -> bool {
        let reason = self.reason.as_ref().filter(|_| self.failure.is_none());
        matches!(
            reason,
            Some(EndReason::GuestShutdown | EndReason::GuestPanic | EndReason::TripleFault)
        )
    }

    /// Explains the end of the microVM to a person, with the last lines of the console or the VMM.
    pub(crate) fn explain(&self) -> Error {
        let message = match (&self.failure, &self.reason) {
            (Some(failure), _) => format!("the microVM could not be started: {failure}"),
            (None, Some(reason)) => describe(reason),
            (None, None) => format!("the VMM ended without a reason: {}{}", self.exit, self.hint()),
        };
        let mut details = Vec::new();
        if !self.console_tail.is_empty() {
            details.push("last lines of the guest's console:".to_owned());
            details.extend(self.console_tail.iter().map(|line| format!("| {line}")));
        }
        if self.reason.is_none() && self.failure.is_none() && !self.stderr.is_empty() {
            details.push("last lines of the VMM:".to_owned());
            details.extend(self.stderr.iter().map(|line| format!("| {line}")));
        }
        Error::with_kind(ErrorKind::VmLost, message).details(details)
    }

    /// A hint for a person, for the case that the kernel or another process has killed the VMM.
    fn hint(&self) -> &'static str {
        if self.killed {
            " (was the host, or the cgroup that this runs in, out of memory? the kernel's log says)"
        } else {
            ""
        }
    }

    /// Like [`Self::explain`], for a microVM that never became ready. The error is of the kind
    /// [`ErrorKind::Failed`], since no process of the container can have run.
    pub(crate) fn explain_boot(&self) -> Error {
        Error { kind: ErrorKind::Failed, ..self.explain() }
    }
}

fn describe(reason: &EndReason) -> String {
    match reason {
        EndReason::GuestShutdown => "the guest shut down by itself".to_owned(),
        EndReason::GuestPanic => "the guest kernel panicked".to_owned(),
        EndReason::TripleFault => "the guest ended in a triple fault".to_owned(),
        EndReason::VcpuFailed { message } => {
            format!("KVM could not run the guest: {}", printable(message))
        }
        EndReason::Stopped => "the microVM was stopped".to_owned(),
        EndReason::VmmFailed { message } => format!("the VMM failed: {}", printable(message)),
    }
}

/// Writes the configuration to a file in memory, which is then at its beginning.
fn config_file(config: &VmConfig) -> Result<File> {
    let what = || "cannot write the configuration of the VMM".to_owned();
    let fd = rustix::fs::memfd_create("isopod-vm-config", rustix::fs::MemfdFlags::CLOEXEC)
        .explain(what)?;
    let mut file = File::from(fd);
    file.write_all(&serde_json::to_vec(config).explain(what)?).explain(what)?;
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0)).explain(what)?;
    Ok(file)
}

/// The places that hear of a VMM's messages.
struct Ears {
    progress: watch::Sender<Progress>,
    replies: Replies,
    drop_caches: DropCaches,
}

/// Follows a VMM from its start to its end, reaps it, and reports its end.
async fn watch_process(
    mut child: Child,
    pidfd: Arc<AsyncFd<OwnedFd>>,
    control: Arc<AsyncFd<OwnedFd>>,
    stderr: pipe::Receiver,
    ears: Ears,
) {
    let Ears { progress, replies, drop_caches } = ears;
    let stderr = tokio::spawn(last_lines(stderr));
    let mut end = VmmEnd::default();
    loop {
        let message = match receive(&control).await {
            Ok(Some(message)) => message,
            Ok(None) => break,
            Err(e) => {
                end.failure.get_or_insert(format!("its control socket failed: {e}"));
                break;
            }
        };
        match message {
            VmmMessage::Event(started @ VmmEvent::Started { .. }) => {
                progress.send_modify(|progress| progress.started = Some(started));
            }
            VmmMessage::Event(VmmEvent::Ended { reason, console_tail }) => {
                end.reason = Some(reason);
                let skip = console_tail.len().saturating_sub(MAX_TAIL_LINES);
                end.console_tail =
                    console_tail.iter().skip(skip).map(|line| printable(line)).collect();
            }
            // Only noted here: `DropCaches::serve` asks the agent.
            VmmMessage::Event(VmmEvent::FilesHigh) => drop_caches.wish(),
            VmmMessage::Event(VmmEvent::Failed { message }) => {
                end.failure = Some(printable(&message));
            }
            VmmMessage::Reply(reply) => {
                let waiting = replies.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                // Nobody waits any more after a while.
                let _ = waiting.map(|waiting| waiting.send(reply));
            }
        }
    }
    // Nobody gets a reply any more.
    replies.lock().unwrap_or_else(PoisonError::into_inner).clear();
    if timeout(LINGER, pidfd.readable()).await.is_err() {
        let _ = rustix::process::pidfd_send_signal(pidfd.get_ref().as_fd(), Signal::KILL);
    }
    // Readable means ended. If waiting for this fails, the wait below blocks until the process has
    // ended.
    let _ = pidfd.readable().await.map(|_| ());
    end.exit = match child.wait() {
        Ok(status) => {
            end.killed = status.signal() == Some(libc::SIGKILL);
            exit_text(status)
        }
        Err(e) => format!("its exit is unknown: {e}"),
    };
    end.stderr = stderr.await.unwrap_or_default();
    progress.send_modify(|progress| progress.end = Some(end));
}

/// The next message of the VMM; `None` when it has closed its end.
async fn receive(control: &AsyncFd<OwnedFd>) -> io::Result<Option<VmmMessage>> {
    // One byte more, to notice a message that is too long.
    let mut packet = vec![0; MAX_MESSAGE_LEN + 1];
    loop {
        let mut guard = control.readable().await?;
        let received = guard.try_io(|control| {
            let received = rustix::net::recv(control, &mut packet[..], RecvFlags::DONTWAIT);
            received.map(|(_, length)| length).map_err(io::Error::from)
        });
        match received {
            Err(_) => {}
            Ok(Ok(0)) => return Ok(None),
            Ok(Err(e)) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            Ok(Err(e)) => return Err(e),
            Ok(Ok(length)) if length > MAX_MESSAGE_LEN => {
                return Err(io::Error::other("a message is too long"));
            }
            Ok(Ok(length)) => return Ok(Some(serde_json::from_slice(&packet[..length])?)),
        }
    }
}

/// Reads a stream to its end, and returns its last lines.
async fn last_lines(mut stream: pipe::Receiver) -> Vec<String> {
    let mut kept = VecDeque::new();
    let mut buffer = [0; 1024];
    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
        kept.extend(&buffer[..length]);
        let excess = kept.len().saturating_sub(MAX_STDERR_LEN);
        kept.drain(..excess);
    }
    let bytes: Vec<u8> = kept.into();
    String::from_utf8_lossy(&bytes).lines().map(printable).collect()
}

#[cfg(test)]
mod tests;

//! The VMM process: started, watched, ended.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::process::{CommandExt, ExitStatusExt},
    },
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use rustix::{
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType},
    process::{Pid, PidfdFlags, Signal},
};
use tokio::{
    io::{AsyncReadExt, unix::AsyncFd},
    net::unix::pipe,
    sync::watch,
    time::timeout,
};

use isopod_vmm::{
    config::VmConfig,
    control::{EndReason, MAX_MESSAGE_LEN, VmmAction, VmmEvent, VmmMessage},
};

use super::{
    forgetting::Forgetting, launch::inherit_only, printable, signals, timeline::Timeline, wait_for,
};
use crate::{
    error::{Error, ErrorKind, Explain, Result},
    state::ProcessId,
};

/// How long a VMM that has closed its control socket may take to end.
const LINGER: Duration = Duration::from_secs(5);

/// How long a VMM may take to stop when asked to.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// Most bytes of the VMM's standard error to keep.
const MAX_STDERR_LEN: usize = 4096;

/// Most lines of the guest's console to repeat.
const MAX_TAIL_LINES: usize = 30;

/// A running VMM. Killed when dropped.
#[derive(Debug)]
pub(super) struct Vmm {
    id: ProcessId,
    pidfd: Arc<AsyncFd<OwnedFd>>,
    control: Arc<AsyncFd<OwnedFd>>,
    progress: watch::Receiver<Progress>,
    forgetting: Forgetting,
}

/// What is known of a VMM.
#[derive(Debug, Clone, Default)]
struct Progress {
    started: Option<VmmEvent>,
    end: Option<VmmEnd>,
}

/// How a VMM ended.
#[derive(Debug, Clone, Default)]
pub(super) struct VmmEnd {
    /// What it said was the reason, if it said anything.
    reason: Option<EndReason>,
    /// Why it could not start the microVM.
    failure: Option<String>,
    /// The last lines of the guest's console.
    console_tail: Vec<String>,
    /// How the process ended.
    exit: String,
    /// It was ended by SIGKILL.
    killed: bool,
    /// The last lines it wrote to its standard error.
    stderr: Vec<String>,
    /// Why it ended, if it is that of a pod, which its first container knows more about.
    of_pod: Option<String>,
}

impl Vmm {
    /// Starts the VMM `program` with `config`, whose `control_fd` is filled in here. Its other
    /// descriptors must stay open until this returns.
    ///
    /// # Errors
    ///
    /// If the program cannot be executed.
    pub(super) fn spawn(program: &Path, mut config: VmConfig) -> Result<Self> {
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
        let mut command = Command::new(program);
        command
            .arg0("isopod-vmm")
            .arg("--config-fd")
            .arg(document.as_raw_fd().to_string())
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        // SAFETY: prctl, getppid, signal, setrlimit, close_range and fcntl are async-signal-safe, and
        // `inherited` was allocated before the fork: the closure allocates nothing and takes no lock.
        unsafe {
            command.pre_exec(move || {
                // The VMM must not outlive the sandbox process, however that ends.
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                if rustix::process::getppid() != Some(own) {
                    return Err(io::Error::from(rustix::io::Errno::SRCH));
                }
                // A signal to every process of the cgroup is for the container, whose end is also
                // that of the VMM.
                signals::ignore()?;
                inherit_only(&inherited)
            });
        }
        let child = command.spawn().explain(what)?;
        Self::watch(child, control).explain(what)
    }

    /// Has a task watch the process. If that is not possible, the process is ended.
    fn watch(mut child: Child, control: OwnedFd) -> io::Result<Self> {
        let prepare = |child: &mut Child| {
            let gone = || io::Error::other("it is gone already");
            let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
            // Not reaped before this process waits for it, so the pid is still its own.
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
        let forgetting = Forgetting::default();
        let wishes = forgetting.clone();
        tokio::spawn(watch_process(child, watched, heard, stderr, sender, wishes));
        Ok(Self { id, pidfd, control, progress, forgetting })
    }

    /// The process.
    pub(super) fn id(&self) -> ProcessId {
        self.id
    }

    /// The wish that the guest forgets files, which the VMM has when the guest knows of many.
    pub(super) fn forgetting(&self) -> Forgetting {
        self.forgetting.clone()
    }

    /// Waits for the end of the VMM.
    pub(super) async fn ended(&self) -> VmmEnd {
        let mut progress = self.progress.clone();
        match progress.wait_for(|progress| progress.end.is_some()).await {
            Ok(progress) => progress.end.clone().unwrap_or_default(),
            // The watching task cannot end without having said how the VMM did.
            Err(_) => VmmEnd::default(),
        }
    }

    /// Fills in the times that the VMM reported.
    pub(super) fn fill_timeline(&self, timeline: &mut Timeline) {
        if let Some(VmmEvent::Started { exec_us, running_us }) = self.progress.borrow().started {
            timeline.vmm_main = Some(exec_us);
            timeline.vcpus = Some(running_us);
        }
    }

    /// Ends the microVM without telling the guest, and waits for the end of the VMM.
    pub(super) async fn stop(&self) -> VmmEnd {
        if let Ok(action) = serde_json::to_vec(&VmmAction::Stop) {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            // If it cannot be asked, it is killed below.
            let _ = rustix::net::send(self.control.get_ref(), &action, flags);
        }
        if let Ok(end) = timeout(STOP_TIMEOUT, self.ended()).await {
            return end;
        }
        self.kill();
        self.ended().await
    }

    fn kill(&self) {
        // Has ended already, if it fails.
        let _ = rustix::process::pidfd_send_signal(self.pidfd.get_ref().as_fd(), Signal::KILL);
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.kill();
    }
}

impl VmmEnd {
    /// The end of a microVM that another sandbox process owns.
    pub(super) fn of_pod(why: String) -> Self {
        Self { of_pod: Some(why), ..Self::default() }
    }

    /// The guest ended as it was asked to.
    pub(super) fn is_shutdown(&self) -> bool {
        self.reason == Some(EndReason::GuestShutdown)
    }

    /// The guest ended by itself, in order or not.
    pub(super) fn is_of_the_guest(&self) -> bool {
        let reason = self.reason.as_ref().filter(|_| self.failure.is_none());
        matches!(
            reason,
            Some(EndReason::GuestShutdown | EndReason::GuestPanic | EndReason::TripleFault)
        )
    }

    /// Why the microVM ended, for a person, with the last lines of console or VMM.
    pub(super) fn explain(&self) -> Error {
        if let Some(why) = &self.of_pod {
            return Error::with_kind(ErrorKind::VmLost, why.clone());
        }
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

    /// What a person may look at when the kernel or somebody else killed the VMM.
    fn hint(&self) -> &'static str {
        if self.killed {
            " (was the host, or the cgroup that this runs in, out of memory? the kernel's log says)"
        } else {
            ""
        }
    }

    /// As [`Self::explain`], for a microVM that never became ready: a failure of our own, since no
    /// process of the container can have run.
    pub(super) fn explain_boot(&self) -> Error {
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

/// The configuration in a file in memory, at its beginning.
fn config_file(config: &VmConfig) -> Result<File> {
    let what = || "cannot write the configuration of the VMM".to_owned();
    let fd = rustix::fs::memfd_create("isopod-vm-config", rustix::fs::MemfdFlags::CLOEXEC)
        .explain(what)?;
    let mut file = File::from(fd);
    file.write_all(&serde_json::to_vec(config).explain(what)?).explain(what)?;
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0)).explain(what)?;
    Ok(file)
}

/// Follows a VMM from its start to its end, reaps it, and says how it went.
async fn watch_process(
    mut child: Child,
    pidfd: Arc<AsyncFd<OwnedFd>>,
    control: Arc<AsyncFd<OwnedFd>>,
    stderr: pipe::Receiver,
    progress: watch::Sender<Progress>,
    forgetting: Forgetting,
) {
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
            // Not asked of the agent yet.
            VmmMessage::Event(VmmEvent::FilesHigh) => forgetting.wish(),
            VmmMessage::Event(VmmEvent::Failed { message }) => {
                end.failure = Some(printable(&message));
            }
            VmmMessage::Reply(_) => {}
        }
    }
    if timeout(LINGER, pidfd.readable()).await.is_err() {
        let _ = rustix::process::pidfd_send_signal(pidfd.get_ref().as_fd(), Signal::KILL);
    }
    // Readable means ended; if waiting for that fails, the wait below blocks until it has.
    let _ = pidfd.readable().await.map(|_| ());
    end.exit = match child.wait() {
        Ok(status) => match (status.code(), status.signal()) {
            (None, Some(libc::SIGKILL)) => {
                end.killed = true;
                "killed by signal 9".to_owned()
            }
            (Some(code), _) => format!("exit status {code}"),
            (None, Some(signal)) => format!("killed by signal {signal}"),
            (None, None) => "unknown exit".to_owned(),
        },
        Err(e) => format!("its exit is unknown: {e}"),
    };
    end.stderr = stderr.await.unwrap_or_default();
    progress.send_modify(|progress| progress.end = Some(end));
}

/// The next message of the VMM; `None` when it has closed its end.
async fn receive(control: &AsyncFd<OwnedFd>) -> io::Result<Option<VmmMessage>> {
    // One byte more, to notice what is too long.
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

/// The last lines of a stream, read to its end.
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

//! Options of `create` and `run`, and the steps from the options to a created container.

use std::{
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    process::{Child, ExitStatus},
    time::Duration,
};

use crate::{
    bundle::Bundle,
    cgroup::{Cgroup, CgroupPlan},
    cli::{Global, pidfd},
    container_id::ContainerId,
    control::{
        Message, client,
        connection::Connection,
        spawn::{self, Launched},
    },
    engine::{Record, hooks},
    error::{Error, Explain, Result},
    exit_text::exit_text,
    host,
    microvm::boot::BootSettings,
    network::RedirectRecord,
    preserved,
    process_id::ProcessId,
    sandbox_process::{Launch, Membership},
    settings,
    signals::Signals,
    state::{StateDir, write_whole},
    terminal::{self, Terminal},
};
use clap::Args;

/// Longest time for a sandbox process to end after it has said that it ends, or has lost the
/// command that launched it.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest time for the processes of a sandbox to end after SIGKILL.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// Options of `create` and `run`.
#[derive(Debug, Args)]
pub(super) struct CreateOptions {
    /// The bundle's directory.
    #[arg(short, long, value_name = "DIR")]
    pub(super) bundle: Option<PathBuf>,
    /// Unix socket that receives the master of the container's terminal.
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// File that gets the pid of the sandbox process, which exits with the container's status.
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Unix socket that receives a pidfd of the sandbox process.
    #[arg(long, value_name = "SOCKET")]
    pidfd_socket: Option<PathBuf>,
    /// Accepted for callers of runc, and without effect: the host's root is never changed.
    #[arg(long)]
    no_pivot: bool,
    /// Accepted for callers of runc, and without effect: the guest has keyrings of its own.
    #[arg(long)]
    no_new_keyring: bool,
    /// Relay the N descriptors from 3 on too: pipes, connected stream sockets, terminals.
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: usize,
}

/// The command that creates a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Caller {
    /// `create`: before the start the container may get a network.
    Create,
    /// `run`, which stays until the end.
    Run,
    /// `run --detach`.
    RunDetached,
}

/// A created container, and the sandbox process that owns it.
pub(super) struct NewContainer {
    pub(super) dir: StateDir,
    pub(super) terminal: Option<Terminal>,
    signals: Signals,
    child: Child,
    /// The connection to the sandbox process, which says when the container is created and how it
    /// has ended.
    launched: Connection,
}

/// Finds the host side of a process's terminal by `terminal: true`, `--detach` and
/// `--console-socket`. Fails if these do not fit together.
pub(super) fn find_terminal(
    wanted: bool,
    detached: bool,
    console_socket: Option<&Path>,
) -> Result<Option<Terminal>> {
    match (wanted, console_socket) {
        (false, None) => Ok(None),
        (true, Some(path)) if detached => {
            let what = || format!("--console-socket {}", path.display());
            let path = std::path::absolute(path).explain(what)?;
            if !std::fs::metadata(&path).explain(what)?.file_type().is_socket() {
                return Err(Error::new(format!("{}: it is not a socket", what())));
            }
            Ok(Some(Terminal::Socket { path }))
        }
        (_, Some(_)) => {
            Err(Error::new("--console-socket is only for a detached process with a terminal"))
        }
        (true, None) if detached => Err(Error::new(
            "a detached process with a terminal needs --console-socket to send the terminal to",
        )),
        (true, None) => {
            // The process has a terminal even if this command has none. The bytes of the terminal
            // then go to and from the standard streams.
            let size = terminal::of_this_process().and_then(terminal::size);
            Ok(Some(Terminal::Inherited { size }))
        }
    }
}

impl CreateOptions {
    /// Creates a container.
    ///
    /// All checks come before anything is made. After a failure everything that was made is
    /// removed.
    pub(super) async fn create(
        &self,
        global: &Global,
        id: ContainerId,
        bundle: &Path,
        command: Option<Vec<String>>,
        caller: Caller,
    ) -> Result<NewContainer> {
        let detached = caller != Caller::Run;
        let listening = preserved::listen_fds();
        let preserved = preserved::find(listening.saturating_add(self.preserve_fds))?;
        let mut bundle = Bundle::load(bundle, command)?;
        if let (Some(process), true) = (bundle.spec.process_mut(), listening > 0) {
            let env = process.env_mut().get_or_insert_default();
            env.extend([format!("LISTEN_FDS={listening}"), "LISTEN_PID=1".to_owned()]);
        }
        let pod = Membership::find(&global.root, &bundle.joined)?;
        if let Some(pod) = &pod {
            pod.check(&bundle.network, &bundle.spec)?;
            bundle.vm = pod.vm;
        }
        let wanted = bundle.spec.process().as_ref().and_then(oci_spec::runtime::Process::terminal);
        let terminal =
            find_terminal(wanted.unwrap_or(false), detached, self.console_socket.as_deref())?;
        let boot = BootSettings {
            artifacts: settings::Artifacts::find()?,
            kernel_params: settings::kernel_params()?,
            share_kernel: settings::share_kernel()?,
            timeout: settings::boot_timeout()?,
            console_log: global.debug,
        };
        let linux = bundle.spec.linux().as_ref();
        let path = linux.and_then(|linux| linux.cgroups_path().as_deref());
        let cgroup = CgroupPlan::find(path, global.systemd_cgroup, &id)?;
        let spare_nics = match caller {
            Caller::Create => bundle.nics.map_or_else(settings::nics, Ok)?,
            Caller::Run | Caller::RunDetached => 0,
        };
        if pod.is_none() {
            // The sandbox process opens it again. This call makes a failure come before anything is
            // made.
            drop(host::open_kvm()?);
        }
        // From here on no signal may end this process and leave behind the things that are made
        // next.
        let signals = Signals::new()?;
        let dir = StateDir::create(&global.root, &id)?;
        let launch = Launch {
            id: id.clone(),
            bundle,
            pod,
            spare_nics,
            boot,
            cgroup,
            terminal: terminal.clone(),
            detached,
            preserved,
            made: dir.made().to_vec(),
            owner_uid: rustix::process::getuid().as_raw(),
            command_us: global.began_us,
        };
        let unit = launch.cgroup.as_ref().and_then(CgroupPlan::unit);
        let launched = match spawn::spawn("sandbox", &id, &dir, unit, &launch.preserved, &launch) {
            Ok(launched) => launched,
            Err(error) => {
                dir.remove()?;
                return Err(error);
            }
        };
        // From here on the sandbox process must be the only holder of the lock: `adopt` takes no
        // lock.
        let adopted = StateDir::adopt(dir.path(), launch.made)?;
        drop(dir);
        let dir = adopted;
        let mut container = NewContainer::new(dir, terminal, signals, launched)?;
        let created = match container.wait_created().await {
            Ok(()) => self.tell_pid(&container),
            Err(error) => Err(error),
        };
        match created {
            Ok(()) => Ok(container),
            Err(error) => {
                container.abandon().await;
                Err(error)
            }
        }
    }

    fn tell_pid(&self, container: &NewContainer) -> Result<()> {
        let pid = container.child.id();
        if let Some(socket) = &self.pidfd_socket {
            pidfd::send(socket, pid, pidfd::Of::Container)?;
        }
        match &self.pid_file {
            Some(path) => write_pid(path, pid),
            None => Ok(()),
        }
    }
}

/// Writes a pid file, whole or not at all.
pub(super) fn write_pid(path: &Path, pid: u32) -> Result<()> {
    write_whole(path, pid.to_string().as_bytes())
        .explain(|| format!("cannot write the pid file {}", path.display()))
}

impl NewContainer {
    fn new(
        dir: StateDir,
        terminal: Option<Terminal>,
        signals: Signals,
        launched: Launched,
    ) -> Result<Self> {
        let Launched { child, socket } = launched;
        Ok(Self { dir, terminal, signals, child, launched: Connection::new(socket)? })
    }

    /// The sandbox process's pid. The kernel does not reuse it before [`Self::wait`] has returned.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the next message or signal. A message of `None` means that the sandbox process has
    /// ended.
    pub(super) async fn next(&mut self) -> Result<Next> {
        tokio::select! {
            message = self.launched.message() => message.map(Next::Message),
            number = self.signals.next() => Ok(Next::Signal(number)),
        }
    }

    /// Waits until the container is created. A signal that asks this process to end aborts the
    /// creation.
    async fn wait_created(&mut self) -> Result<()> {
        let message = tokio::select! {
            message = self.launched.message() => message?,
            number = self.signals.next_ending() => return Err(Error::new(format!(
                "interrupted by signal {number} while the container was created"
            ))),
        };
        match message {
            Some(Message::Created) => Ok(()),
            Some(Message::Failed(error)) => Err(error),
            Some(_) => Err(Error::new("the sandbox process said something unexpected")),
            None => Err(Error::new(format!(
                "the sandbox process ended before the container was created: {}",
                exit_text(self.wait()?)
            ))),
        }
    }

    /// Ends and removes a container after an error. The caller reports the error.
    pub(super) async fn abandon(self) {
        let Self { dir, mut child, launched, .. } = self;
        // A sandbox process that still creates the container ends when the connection closes. After
        // the creation it has to be told by SIGKILL, which it cannot miss.
        drop(launched);
        if Record::read(&dir)
            .ok()
            .flatten()
            .is_some_and(|r| r.status != crate::state::Status::Creating)
        {
            let _ = child.kill();
        }
        // The sandbox process runs its poststop hooks before it ends.
        let hooks = Record::read(&dir).ok().flatten().and_then(|record| record.hooks);
        let hooks =
            hooks.as_ref().and_then(|hooks| hooks.poststop().as_deref()).unwrap_or_default();
        let limit = hooks::time_limit(hooks).unwrap_or(END_TIMEOUT).saturating_add(END_TIMEOUT);
        let removed = match wait_within(&mut child, limit).and_then(|_| Record::read(&dir)) {
            Ok(record) => remove(&dir, record.as_ref()).await,
            Err(error) => Err(error),
        };
        if let Err(left) = removed {
            log::warn!("{left}");
        }
    }

    /// Waits for the end of the sandbox process, and kills it after `END_TIMEOUT`.
    pub(super) fn wait(&mut self) -> Result<ExitStatus> {
        wait_within(&mut self.child, END_TIMEOUT)
    }
}

/// Waits for the end of a sandbox process that is about to end. Kills it after `limit`, because a
/// signal may have stopped it.
fn wait_within(child: &mut Child, limit: Duration) -> Result<ExitStatus> {
    let process = i32::try_from(child.id()).ok().and_then(ProcessId::of);
    if process.is_some_and(|process| !process.wait(limit)) {
        log::warn!(
            "the sandbox process {} does not end within {} seconds, so it is killed",
            child.id(),
            limit.as_secs()
        );
        let _ = child.kill();
    }
    child.wait().explain(|| "cannot wait for the sandbox process".into())
}

/// The next event for a command that waits for its sandbox process.
pub(super) enum Next {
    /// The sandbox process has sent a message, or has ended.
    Message(Option<Message>),
    /// This process has got a signal.
    Signal(u32),
}

/// Removes the remains of a container, by its record, and runs its poststop hooks. First kills a
/// sandbox process that still runs.
///
/// A part that cannot be removed does not keep the other parts. Only the state directory stays
/// then, for the next attempt. The error is the first failure.
pub(super) async fn remove(dir: &StateDir, record: Option<&Record>) -> Result<()> {
    let network = match record {
        Some(record) => {
            end_processes(record)?;
            record.network.as_ref().map_or(Ok(()), RedirectRecord::remove)
        }
        None => Ok(()),
    };
    // Another process has the lock, and is about to remove the container too.
    if !dir.try_lock()? {
        return network;
    }
    // The sandbox process of a pod lets a member go when the member's own process has gone. If it
    // cannot do so now, it does so later, and that keeps nobody from removing the rest.
    if record.is_some_and(|record| record.pod.is_some())
        && let Err(error) = client::wait_gone(dir)
    {
        log::warn!("{error}");
    }
    let cgroup = record.and_then(|record| record.cgroup.as_ref()).map_or(Ok(()), Cgroup::remove);
    // Everything that can be removed is removed. The rest stays for the next attempt.
    let mut failures = [network, cgroup].into_iter().filter_map(Result::err);
    if let Some(first) = failures.next() {
        failures.for_each(|other| log::warn!("{other}"));
        return Err(first);
    }
    if let (true, Some(record)) = (dir.remove()?, record) {
        hooks::run_poststop(record, None).await;
    }
    Ok(())
}

/// Kills the sandbox process and the VMM. While one of them lives, its resources cannot be removed.
pub(super) fn end_processes(record: &Record) -> Result<()> {
    let processes = [Some(record.sandbox), record.vmm].into_iter().flatten();
    // Both are killed, even if the first does not end.
    let left: Vec<_> = processes.filter(|process| !process.kill(KILL_TIMEOUT)).collect();
    match left.first() {
        None => Ok(()),
        Some(process) => Err(Error::new(format!(
            "process {} of container {} does not end when it is killed",
            process.pid, record.id
        ))),
    }
}

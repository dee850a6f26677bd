//! What `create` and `run` have in common: from options to a created container.

use std::{
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    process::{Child, ExitStatus},
    time::Duration,
};

use clap::Args;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use super::{Global, pidfd};
use crate::{
    bundle::Bundle,
    cgroup::{Cgroup, Place},
    error::{Error, Explain, Result},
    host,
    network::Taken,
    sandbox::{
        control::{MAX_MESSAGE_LEN, Message},
        hooks,
        launch::{self, Launch, Launched, Terminal},
        pod::Membership,
        preserved,
        signals::Signals,
    },
    settings,
    state::{Id, ProcessId, Record, StateDir, write_whole},
    terminal,
};

/// How long a sandbox process may take to end that has said that it does, or has lost who launched it.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the processes of a sandbox may take to end when they are killed.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// Options of `create` and `run`.
#[derive(Debug, Args)]
pub(super) struct CreateOptions {
    /// The bundle's directory.
    #[arg(short, long, value_name = "DIR")]
    pub(super) bundle: Option<PathBuf>,
    /// Unix socket that gets the master of the container's terminal.
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// Write the pid of the sandbox process to this file; it exits with the container's status.
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Unix socket that gets a pidfd of the sandbox process.
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

/// A container that has been created, and the process that owns it.
pub(super) struct NewContainer {
    pub(super) dir: StateDir,
    pub(super) terminal: Option<Terminal>,
    signals: Signals,
    child: Child,
    reader: BufReader<OwnedReadHalf>,
    /// What has been read of the next message.
    line: Vec<u8>,
    pub(super) writer: OwnedWriteHalf,
}

/// Where a process's terminal is on the host, from `terminal: true`, `--detach` and
/// `--console-socket`.
///
/// # Errors
///
/// If they do not fit together.
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
            // Without any, the process has a terminal all the same, whose ends are what the standard
            // streams are.
            let size = terminal::of_this_process().and_then(terminal::size);
            Ok(Some(Terminal::Inherited { size }))
        }
    }
}

impl CreateOptions {
    /// Creates a container, with `spare_nics` if somebody may give it a network before its start.
    /// Everything is checked before anything is made, and everything that was
    /// made is removed if it fails.
    ///
    /// # Errors
    ///
    /// What was wrong.
    pub(super) async fn create(
        &self,
        global: &Global,
        id: Id,
        bundle: &Path,
        command: Option<Vec<String>>,
        detached: bool,
        spare_nics: bool,
    ) -> Result<NewContainer> {
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
        }
        let wanted = bundle.spec.process().as_ref().and_then(oci_spec::runtime::Process::terminal);
        let terminal =
            find_terminal(wanted.unwrap_or(false), detached, self.console_socket.as_deref())?;
        let artifacts = settings::Artifacts::find()?;
        let kernel_params = settings::kernel_params()?;
        let share_kernel = settings::share_kernel()?;
        let boot_timeout = settings::boot_timeout()?;
        let linux = bundle.spec.linux().as_ref();
        let path = linux.and_then(|linux| linux.cgroups_path().as_deref());
        let cgroup = Place::find(path, global.systemd_cgroup, &id)?;
        let spare_nics = if spare_nics { bundle.nics.map_or_else(settings::nics, Ok)? } else { 0 };
        if pod.is_none() {
            // Opened again by the sandbox process; this is to fail before anything is made.
            drop(host::open_kvm()?);
        }
        // Handled from here on, so that none leaves behind what is made next.
        let signals = Signals::new()?;
        let dir = StateDir::create(&global.root, &id)?;
        let launch = Launch {
            id: id.clone(),
            bundle: bundle.dir,
            rootfs: bundle.rootfs,
            spec: bundle.spec,
            seccomp: bundle.seccomp,
            binds: bundle.binds,
            hooks: bundle.hooks,
            vm: pod.as_ref().map_or(bundle.vm, |pod| pod.vm),
            nested: bundle.nested,
            pod,
            network: bundle.network,
            spare_nics,
            artifacts,
            cgroup,
            terminal: terminal.clone(),
            detached,
            preserved,
            kernel_params,
            share_kernel,
            boot_timeout,
            made: dir.made().to_vec(),
            console_log: global.debug,
            owner_uid: rustix::process::getuid().as_raw(),
            command_us: global.began_us,
        };
        let unit = launch.cgroup.as_ref().and_then(Place::unit);
        let launched = match launch::spawn("sandbox", &id, &dir, unit, &launch.preserved, &launch) {
            Ok(launched) => launched,
            Err(error) => {
                dir.remove()?;
                return Err(error);
            }
        };
        // From here on the sandbox process has the lock, and must be the only one.
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

/// Writes a pid file, all or nothing.
///
/// # Errors
///
/// If it cannot be written.
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
        let what = || "cannot use the connection to the sandbox process".to_owned();
        let Launched { child, socket } = launched;
        socket.set_nonblocking(true).explain(what)?;
        let (reader, writer) = UnixStream::from_std(socket).explain(what)?.into_split();
        Ok(Self {
            dir,
            terminal,
            signals,
            child,
            reader: BufReader::new(reader),
            line: Vec::new(),
            writer,
        })
    }

    /// The sandbox process's pid. Not reused before [`Self::wait`] has returned.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next message of the sandbox process, `None` if it has ended, or a signal.
    pub(super) async fn next(&mut self) -> Result<Next> {
        tokio::select! {
            message = next_message(&mut self.reader, &mut self.line) => message.map(Next::Message),
            number = self.signals.next() => Ok(Next::Signal(number)),
        }
    }

    /// Waits until the container is created. A signal gives it up.
    async fn wait_created(&mut self) -> Result<()> {
        let message = tokio::select! {
            message = next_message(&mut self.reader, &mut self.line) => message?,
            number = self.signals.next_ending() => return Err(Error::new(format!(
                "interrupted by signal {number} while the container was created"
            ))),
        };
        match message {
            Some(Message::Created) => Ok(()),
            Some(Message::Failed { error }) => Err(error),
            Some(_) => Err(Error::new("the sandbox process said something unexpected")),
            None => Err(Error::new(format!(
                "the sandbox process ended before the container was created: {}",
                describe(self.wait()?)
            ))),
        }
    }

    /// Ends a container that is not wanted any more because of an error, which is what the caller
    /// reports, and removes it.
    pub(super) async fn abandon(self) {
        let Self { dir, mut child, reader, writer, .. } = self;
        // The end of the connection tells a sandbox process that still creates; one that has created
        // the container has to be told, by the signal that it cannot miss.
        drop((reader, writer));
        if dir.record().ok().flatten().is_some_and(|r| r.status != crate::state::Status::Creating) {
            let _ = child.kill();
        }
        // Its poststop hooks are part of what it does before it ends.
        let hooks = dir.record().ok().flatten().and_then(|record| record.hooks);
        let hooks =
            hooks.as_ref().and_then(|hooks| hooks.poststop().as_deref()).unwrap_or_default();
        let limit = hooks::time_limit(hooks).unwrap_or(END_TIMEOUT).saturating_add(END_TIMEOUT);
        let removed = match wait_within(&mut child, limit).and_then(|_| dir.record()) {
            Ok(record) => remove(&dir, record.as_ref()).await,
            Err(error) => Err(error),
        };
        if let Err(left) = removed {
            log::warn!("{left}");
        }
    }

    /// Waits for the end of the sandbox process.
    ///
    /// # Errors
    ///
    /// If that is not possible.
    pub(super) fn wait(&mut self) -> Result<ExitStatus> {
        wait_within(&mut self.child, END_TIMEOUT)
    }
}

/// Waits for the end of a sandbox process that is about to end, and kills it if it takes longer than
/// `limit`: it may have been stopped.
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

/// What happened next.
pub(super) enum Next {
    /// The sandbox process said something, or has ended.
    Message(Option<Message>),
    /// This process got a signal.
    Signal(u32),
}

/// The next message of the sandbox process; `None` if it has ended. What has been read of a message
/// when this is cancelled stays in `line` for the next call.
async fn next_message(
    reader: &mut BufReader<OwnedReadHalf>,
    line: &mut Vec<u8>,
) -> Result<Option<Message>> {
    let what = || "cannot hear from the sandbox process".to_owned();
    let mut limited = reader.take(MAX_MESSAGE_LEN as u64);
    match limited.read_until(b'\n', line).await {
        Err(e) if e.kind() != std::io::ErrorKind::ConnectionReset => Err(e).explain(what),
        _ if line.is_empty() => Ok(None),
        _ => serde_json::from_slice(&std::mem::take(line)).map(Some).explain(what),
    }
}

/// How a process ended, for a person.
pub(super) fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "unknown".to_owned(),
    }
}

/// Removes what is left of a container whose sandbox process has ended or is to be killed, and whose
/// record this is. Then runs its poststop hooks. What cannot be removed does not keep the rest: only
/// the state directory stays then, by which this can be tried again.
///
/// # Errors
///
/// The first of those that kept something.
pub(super) async fn remove(dir: &StateDir, record: Option<&Record>) -> Result<()> {
    let network = match record {
        Some(record) => {
            end_processes(record)?;
            record.network.as_ref().map_or(Ok(()), Taken::give_back)
        }
        None => Ok(()),
    };
    // Whoever else has the lock now is about to remove it too.
    if !dir.try_lock()? {
        return network;
    }
    let pod = match record.and_then(|record| Some((record.pod.as_ref()?, &record.id))) {
        Some((pod, id)) => pod.clean_up(id).await,
        None => Ok(()),
    };
    let cgroup = record.and_then(|record| record.cgroup.as_ref()).map_or(Ok(()), Cgroup::remove);
    // What can be removed is; what cannot stays for the next try.
    let mut failures = [network, pod, cgroup].into_iter().filter_map(Result::err);
    if let Some(first) = failures.next() {
        failures.for_each(|other| log::warn!("{other}"));
        return Err(first);
    }
    if let (true, Some(record)) = (dir.remove()?, record) {
        hooks::run_poststop(record, None).await;
    }
    Ok(())
}

/// Kills sandbox process and VMM. While one of them lives, what it uses cannot be removed.
///
/// # Errors
///
/// If one of them does not end.
pub(super) fn end_processes(record: &Record) -> Result<()> {
    let processes = [Some(record.sandbox), record.vmm].into_iter().flatten();
    // Both, even if one does not end.
    let left: Vec<_> = processes.filter(|process| !process.kill(KILL_TIMEOUT)).collect();
    match left.first() {
        None => Ok(()),
        Some(process) => Err(Error::new(format!(
            "process {} of container {} does not end when it is killed",
            process.pid, record.id
        ))),
    }
}

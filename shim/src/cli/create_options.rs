//! Options of `create` and `run`, and the steps from the options to a created container.

use std::{
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use crate::{
    bundle::Bundle,
    cgroup::CgroupPlan,
    cli::{Global, new_container::NewContainer, pidfd, pod_microvm},
    container_id::ContainerId,
    control::remains::remove_killed_holder,
    error::{Error, Explain, Result},
    host,
    microvm::{boot::BootSettings, disks::spare_disks},
    preserved,
    sandbox_process::Launch,
    settings,
    signals::Signals,
    state::{StateDir, write_whole},
    terminal::{self, Terminal},
};
use clap::Args;

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
        let wanted = bundle.spec.process().as_ref().and_then(oci_spec::runtime::Process::terminal);
        let terminal =
            find_terminal(wanted.unwrap_or(false), detached, self.console_socket.as_deref())?;
        let boot = BootSettings::of_host(global.debug)?;
        let linux = bundle.spec.linux().as_ref();
        let path = linux.and_then(|linux| linux.cgroups_path().as_deref());
        let cgroup = CgroupPlan::find(path, global.systemd_cgroup, &id)?;
        let spare_nics = match caller {
            Caller::Create => bundle.nics.map_or_else(settings::nics, Ok)?,
            Caller::Run | Caller::RunDetached => 0,
        };
        let spare_disks = spare_disks(&bundle)?;
        let lock = pod_microvm::lock(&bundle).await?;
        // From here on no signal may end this process and leave behind the things that are made
        // next.
        let signals = Signals::new()?;
        // Held until the container is in the pod's microVM.
        let (pod, _held, signals) = pod_microvm::find(global, &bundle, signals).await?;
        drop(lock);
        match &pod {
            Some(pod) => pod.fit(&mut bundle)?,
            // The sandbox process opens it again. This call makes a failure come before anything is
            // made.
            None => drop(host::open_kvm()?),
        }
        let dir = StateDir::create(&global.root, &id)?;
        let launch = Launch {
            id: id.clone(),
            bundle,
            pod,
            holder: false,
            spare_nics,
            spare_disks,
            boot,
            cgroup,
            terminal: terminal.clone(),
            detached,
            preserved,
            made: dir.made().to_vec(),
            command_us: global.began_us,
        };
        let container = match NewContainer::launch(dir, &launch, signals).await {
            Ok(container) => container,
            Err(error) => {
                if let Some(pod) = &launch.pod
                    && let Err(left) = remove_killed_holder(&pod.pod).await
                {
                    log::warn!("{left}");
                }
                return Err(error);
            }
        };
        match self.tell_pid(&container) {
            Ok(()) => Ok(container),
            Err(error) => {
                container.abandon().await;
                Err(error)
            }
        }
    }

    fn tell_pid(&self, container: &NewContainer) -> Result<()> {
        let pid = container.pid();
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

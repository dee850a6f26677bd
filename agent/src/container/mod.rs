//! Containers: from a specification to processes in namespaces and a cgroup.
//!
//! ```text
//!            CreateContainer        StartContainer          the first process ends
//!  (nothing) ---------------> Created ------------> Running ----------------------> Stopped
//!                                |                                                    ^  |
//!                                '------------- a signal, or execve fails ------------'  |
//!  (nothing) <--------------------------------------------------- DeleteContainer -------'
//! ```
//!
//! [`init`] and the modules that it calls run in the container's own process, all others in the
//! agent.

pub(crate) mod cgroup;
mod channel;
mod clone;
mod copy_up;
mod credentials;
mod device_nodes;
mod devices;
mod environment;
pub(crate) mod exec;
mod exec_table;
mod executable;
mod execve;
mod hooks;
pub(crate) mod init;
mod launch;
mod mount_options;
mod mounts;
mod namespaces;
pub(crate) mod path;
pub(crate) mod process;
mod process_list;
mod resource_update;
mod resources;
mod rlimits;
mod rootfs;
mod scheduling;
pub(crate) mod seccomp;
mod signals;
mod spec;
mod stats;
pub(crate) mod stdio;
pub(crate) mod terminal;

use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use isopod_protocol::SHARED_DIR;
use isopod_protocol::agent::{ContainerStats, Network, ProcessInfo};

use self::cgroup::Cgroup;
use self::channel::InitRequest;
use self::clone::{Parent, Shared};
use self::exec_table::ExecTable;
use self::launch::{Launch, Launched};
use self::namespaces::{Join, Namespaces};
use self::process::Process;
use self::seccomp::SeccompFilter;
use self::spec::ContainerSpec;
use self::stdio::{Connections, Pipes};
use self::terminal::Screen;
use crate::error::{Context as _, Error, Result};
use crate::log::log_warn;
use crate::oci::{Capabilities, HookState, NamespaceKind, PosixRlimit};
use crate::pump::Late;
use crate::reaper::Reaper;

/// A container whose first process exists.
pub(crate) struct Container {
    id: String,
    namespaces: Namespaces,
    defaults: ExecDefaults,
    cgroup: Arc<Cgroup>,
    init: Arc<Process>,
    execs: Mutex<ExecTable>,
    /// Sources of the bind mounts that lie in the shared directory.
    binds: Vec<PathBuf>,
}

/// Documents that a container is made from.
pub(crate) struct Document {
    spec_json: Vec<u8>,
    /// State object for the hooks, if there are any.
    state: Option<HookState>,
    /// System call filter.
    filter: Option<SeccompFilter>,
}

impl Document {
    /// Takes config.json, the specification's state object, which may be empty, and a filter.
    pub(crate) fn of(
        spec_json: Vec<u8>,
        state_json: &[u8],
        filter: Option<SeccompFilter>,
    ) -> Result<Self> {
        let state = (!state_json.is_empty()).then(|| serde_json::from_slice(state_json));
        let state = state.transpose().map_err(|e| Error::invalid("state_json", e))?;
        Ok(Self { spec_json, state, filter })
    }
}

/// Defaults of further processes whose own specification leaves a setting out. Filter and
/// personality are the same for all of them.
struct ExecDefaults {
    capabilities: Option<Capabilities>,
    no_new_privileges: Option<bool>,
    oom_score_adj: i32,
    rlimits: Vec<PosixRlimit>,
    filter: Option<SeccompFilter>,
    personality: Option<u32>,
}

impl Container {
    /// Builds a container up to but not including `execve`, in a cgroup named by the container's
    /// id. `find` returns the containers whose namespaces it may share.
    ///
    /// On failure nothing of the container is left but the cgroup.
    pub(crate) async fn create(
        reaper: Arc<Reaper>,
        cgroup: Arc<Cgroup>,
        document: Document,
        connections: Connections,
        screen: Screen,
        network: Option<Network>,
        find: impl Fn(&str) -> Result<Arc<Self>>,
    ) -> Result<Self> {
        let spec = ContainerSpec::parse(&document.spec_json)?;
        let (pipes, streams) = Pipes::make(&connections, spec.process.terminal)?;
        let kept = document.filter.clone();
        let shared = spec.joins.iter().map(|join| find(&join.container)?.share(join));
        let shared = shared.collect::<Result<Vec<_>>>()?;
        let made = Arc::clone(&cgroup);
        let work = move || {
            let parent = Parent::New {
                namespaces: spec.namespaces,
                linux: &spec.linux,
                network: network.as_ref(),
                shared: &shared,
            };
            let launched = prepare(&reaper, &made, &spec, parent, document, streams, screen)?;
            Ok((spec, launched))
        };
        let (spec, launched) = blocking(work).await?;
        let made = Arc::clone(&cgroup);
        let init = Process::new(launched, made, 0, pipes, connections, Late::Dropped)?;
        let init = Arc::new(init);
        let defaults = ExecDefaults {
            capabilities: spec.process.capabilities.clone(),
            no_new_privileges: spec.process.no_new_privileges,
            oom_score_adj: spec.process.oom_score_adj.unwrap_or(0),
            rlimits: spec.process.rlimits.clone().unwrap_or_default(),
            filter: kept,
            personality: spec.personality()?,
        };
        let namespaces = spec.namespaces;
        if !namespaces.is_own(NamespaceKind::Pid) {
            kill_rest_at_exit(Arc::clone(&init), Arc::clone(&cgroup));
        }
        let execs = Mutex::default();
        let sources = spec.spec.mounts.iter().filter_map(|mount| mount.source.clone());
        let binds = sources.filter(|source| source.starts_with(SHARED_DIR)).collect();
        let id = cgroup.id();
        Ok(Self { id, namespaces, defaults, cgroup, init, execs, binds })
    }

    /// The container's namespaces, for another container that shares them.
    fn share(&self, join: &Join) -> Result<Shared> {
        let init = self.init.pidfd().try_clone().context(|| "duplicate a descriptor")?;
        Ok(Shared { container: self.id.clone(), pid: self.init.pid(), init, bits: join.bits })
    }

    /// Adds devices, addresses and routes to the container's network namespace after its creation.
    /// The container needs a network namespace of its own, and must not have ended.
    pub(crate) async fn set_up_network(&self, network: Network) -> Result<()> {
        if !self.namespaces.is_own(NamespaceKind::Network) || self.init.has_ended() {
            return Err(Error::state(format!(
                "container {:?} has ended, or has no network namespace of its own",
                self.id
            )));
        }
        let init = Arc::clone(&self.init);
        blocking(move || crate::network::set_up(&network, init.pid(), init.pidfd())).await
    }

    /// Connects to a TCP port at loopback in the container's network namespace, which may be another
    /// container's. The container must not have ended.
    pub(crate) async fn connect(&self, port: u16, ipv6: bool) -> Result<TcpStream> {
        self.check_not_ended()?;
        let init = Arc::clone(&self.init);
        blocking(move || crate::network::connect(init.pidfd(), port, ipv6)).await
    }

    /// Lets the first process call `execve`. Fails in every state but Created.
    pub(crate) async fn start(&self) -> Result<()> {
        self.check_not_ended()?;
        let binds = self.binds.clone();
        blocking(move || {
            binds.iter().for_each(|source| mounts::revalidate(source));
            Ok(())
        })
        .await?;
        self.init.start().await
    }

    /// Returns the process with this id. The empty id is the first process's.
    pub(crate) fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        self.execs().get(exec_id)
    }

    /// Sends a signal to every process of the container.
    pub(crate) async fn signal_all(&self, signal: u32) -> Result<()> {
        let signal = process::signal_number(signal)?;
        let cgroup = Arc::clone(&self.cgroup);
        blocking(move || match signal {
            libc::SIGKILL => cgroup.kill(),
            signal => cgroup.while_frozen(|| {
                for pid in cgroup.pids()? {
                    signal_pid(pid, signal);
                }
                Ok(())
            }),
        })
        .await
    }

    /// All processes of the container.
    pub(crate) async fn processes(&self) -> Result<Vec<ProcessInfo>> {
        let cgroup = Arc::clone(&self.cgroup);
        let level = usize::from(self.namespaces.has(NamespaceKind::Pid));
        blocking(move || Ok(process_list::describe(&cgroup.pids()?, level))).await
    }

    /// Freezes all processes of the container until [`Self::resume`].
    pub(crate) async fn pause(&self) -> Result<()> {
        self.check_not_ended()?;
        let cgroup = Arc::clone(&self.cgroup);
        blocking(move || cgroup.pause()).await
    }

    /// Thaws all processes of a paused container.
    pub(crate) async fn resume(&self) -> Result<()> {
        self.check_not_ended()?;
        let cgroup = Arc::clone(&self.cgroup);
        blocking(move || cgroup.resume()).await
    }

    /// Changes the limits of the container. If a limit cannot be set, the limits set before it are
    /// restored.
    pub(crate) async fn update(&self, resources_json: Vec<u8>) -> Result<()> {
        self.check_not_ended()?;
        let cgroup = Arc::clone(&self.cgroup);
        blocking(move || resource_update::update(&cgroup, &resources_json)).await
    }

    /// Use and limits of the container. A container whose cgroup has been removed has ended.
    pub(crate) async fn stats(&self) -> Result<ContainerStats> {
        let (cgroup, pid) = (Arc::clone(&self.cgroup), self.init.pid());
        let stats = blocking(move || stats::read(&cgroup, pid)).await?;
        stats.ok_or_else(|| self.ended())
    }

    /// Waits until the count of OOM kills in the container differs from `seen`, or the container
    /// has ended. Returns the count, and whether the container has ended.
    pub(crate) async fn wait_oom(&self, seen: u64) -> Result<(u64, bool)> {
        let mut events = self.cgroup.watch_memory_events()?;
        loop {
            let ended = self.init.has_ended();
            let count = self.cgroup.oom_kills();
            if count != seen || ended {
                return Ok((count, ended));
            }
            tokio::select! {
                changed = events.changed() => changed?,
                _ = self.init.wait() => {}
            }
        }
    }

    fn check_not_ended(&self) -> Result<()> {
        if self.init.has_ended() { Err(self.ended()) } else { Ok(()) }
    }

    fn ended(&self) -> Error {
        Error::state(format!("container {:?} has ended", self.id))
    }

    /// Kills all processes of the container, unless the first one has ended, and waits for its end.
    pub(crate) async fn end(&self) -> Result<()> {
        if self.init.has_ended() {
            return Ok(());
        }
        let cgroup = Arc::clone(&self.cgroup);
        blocking(move || match cgroup.kill() {
            // A deletion during the creation has removed the cgroup, with all processes.
            Err(_) if !cgroup.path().exists() => Ok(()),
            result => result,
        })
        .await?;
        self.init.wait().await;
        Ok(())
    }

    /// Removes the cgroup of a container whose first process has ended.
    pub(crate) async fn remove(&self) -> Result<()> {
        if !self.init.has_ended() {
            return Err(Error::state(format!("container {:?} has not ended", self.id)));
        }
        let cgroup = Arc::clone(&self.cgroup);
        blocking(move || cgroup.remove()).await
    }

    fn execs(&self) -> MutexGuard<'_, ExecTable> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Applies the limits, launches the first process, and applies the device rules. Blocks.
fn prepare(
    reaper: &Reaper,
    cgroup: &Cgroup,
    spec: &ContainerSpec,
    parent: Parent<'_>,
    document: Document,
    streams: Vec<OwnedFd>,
    screen: Screen,
) -> Result<Launched> {
    let path = cgroup.path().to_string_lossy().into_owned();
    let Document { spec_json, state, filter } = document;
    let request = InitRequest::Create { cgroup: path, filter, screen, state };
    resources::apply(cgroup, &spec.linux.resources)?;
    let launched = launch::launch(
        reaper,
        Launch {
            step_timeout: spec
                .hooks_limit()
                .and_then(|limit| limit.checked_add(launch::STEP_TIMEOUT)),
            parent,
            cgroup,
            request,
            document: &spec_json,
            streams,
            oom_score_adj: spec.process.oom_score_adj.unwrap_or(0),
            rlimits: spec.process.rlimits.as_deref().unwrap_or_default(),
        },
    )?;
    // The process has mounted its file systems, and waits for the start. The rules need not allow it
    // the disks of these file systems.
    match devices::attach(cgroup.dir(), &spec.linux.resources.devices) {
        Ok(()) => Ok(launched),
        Err(e) => {
            clone::kill(&launched.pidfd);
            Err(e)
        }
    }
}

/// Kills the remaining processes when the first one ends. Only a pid namespace would end them by
/// itself.
fn kill_rest_at_exit(init: Arc<Process>, cgroup: Arc<Cgroup>) {
    tokio::spawn(async move {
        init.wait().await;
        if let Err(e) = cgroup.kill() {
            log_warn!("{e}");
        }
    });
}

/// Signals a process of a frozen group, whose pid cannot have been reused.
fn signal_pid(pid: u32, signal: i32) {
    let Ok(pid) = libc::pid_t::try_from(pid) else { return };
    // SAFETY: plain numbers are passed. A process that has just been killed is no error.
    unsafe { libc::kill(pid, signal) };
}

/// Runs blocking work on a thread of the runtime's pool.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::internal(e.to_string()))?
}

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
//! [`init`] and what it calls runs in the container's own process, all else in the agent.

pub(crate) mod cgroup;
mod channel;
mod copy_up;
mod credentials;
mod device_nodes;
mod devices;
mod environment;
mod exec;
mod execs;
mod executable;
mod hooks;
pub(crate) mod init;
mod launch;
mod mount_options;
mod mounts;
mod namespaces;
pub(crate) mod path;
pub(crate) mod process;
mod processes;
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

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use isopod_protocol::SHARED_DIR;
use isopod_protocol::agent::{ContainerStats, Network, ProcessInfo};

use self::cgroup::Cgroup;
use self::channel::Request;
use self::execs::Execs;
use self::launch::{Birth, Launch, Launched, Shared};
use self::namespaces::{Join, Namespaces};
use self::process::Process;
use self::seccomp::Filter;
use self::spec::ContainerSpec;
use self::stdio::{Connections, Pipes};
use self::terminal::Screen;
use crate::error::{Context as _, Error, Result};
use crate::log::log_warn;
use crate::oci::{Capabilities, NamespaceKind, PosixRlimit, State};
use crate::pump::Late;
use crate::reaper::Reaper;

/// A container whose first process exists.
pub(crate) struct Container {
    id: String,
    namespaces: Namespaces,
    defaults: ExecDefaults,
    cgroup: Arc<Cgroup>,
    init: Arc<Process>,
    execs: Mutex<Execs>,
    /// What its bind mounts show.
    binds: Vec<PathBuf>,
}

/// What a container is made from.
pub(crate) struct Document {
    spec_json: Vec<u8>,
    /// For hooks, if there are any.
    state: Option<State>,
    /// Of system calls.
    filter: Option<Filter>,
}

impl Document {
    /// From config.json, the specification's state object, which may be empty, and a filter.
    ///
    /// # Errors
    ///
    /// The state is none.
    pub(crate) fn of(
        spec_json: Vec<u8>,
        state_json: &[u8],
        filter: Option<Filter>,
    ) -> Result<Self> {
        let state = (!state_json.is_empty()).then(|| serde_json::from_slice(state_json));
        let state = state.transpose().map_err(|e| Error::invalid("state_json", e))?;
        Ok(Self { spec_json, state, filter })
    }
}

/// What further processes get where their own specification is silent, and what is the same for all
/// of them: filter and personality.
struct ExecDefaults {
    capabilities: Option<Capabilities>,
    no_new_privileges: Option<bool>,
    oom_score_adj: i32,
    rlimits: Vec<PosixRlimit>,
    filter: Option<Filter>,
    personality: Option<u32>,
}

impl Container {
    /// Builds a container up to but not including `execve`, in a cgroup that has its id. `find` tells of
    /// the containers whose namespaces it may share.
    ///
    /// # Errors
    ///
    /// What went wrong. Nothing of the container is left then but the cgroup.
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
            let birth = Birth::New {
                namespaces: spec.namespaces,
                linux: &spec.linux,
                network: network.as_ref(),
                shared: &shared,
            };
            let launched = prepare(&reaper, &made, &spec, birth, document, streams, screen)?;
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

    /// Its namespaces, for a container that shares them.
    fn share(&self, join: &Join) -> Result<Shared> {
        let init = self.init.pidfd().try_clone().context(|| "duplicate a descriptor")?;
        Ok(Shared { container: self.id.clone(), init, bits: join.bits })
    }

    /// Gives the container's network namespace what was not there when it was created.
    ///
    /// # Errors
    ///
    /// The container has no network namespace or has ended, or the step that failed.
    pub(crate) async fn set_up_network(&self, network: Network) -> Result<()> {
        if !self.namespaces.is_own(NamespaceKind::Network) || self.init.has_ended() {
            return Err(Error::state(format!("container {:?} takes no network", self.id)));
        }
        let init = Arc::clone(&self.init);
        blocking(move || crate::network::set_up(&network, init.pid(), init.pidfd())).await
    }

    /// Lets the first process call `execve`.
    ///
    /// # Errors
    ///
    /// Why it failed, or that the container is not in the state for it.
    pub(crate) async fn start(&self) -> Result<()> {
        self.check_not_ended()?;
        let binds = self.binds.clone();
        blocking(move || {
            binds.iter().for_each(|source| mounts::look_again(source));
            Ok(())
        })
        .await?;
        self.init.start().await
    }

    /// The first process, or the one with this id.
    ///
    /// # Errors
    ///
    /// There is none.
    pub(crate) fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        self.execs().get(exec_id)
    }

    /// Sends a signal to every process of the container.
    ///
    /// # Errors
    ///
    /// The cgroup cannot be used, or there is no such signal.
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
    ///
    /// # Errors
    ///
    /// The cgroup cannot be read.
    pub(crate) async fn processes(&self) -> Result<Vec<ProcessInfo>> {
        let cgroup = Arc::clone(&self.cgroup);
        let level = usize::from(self.namespaces.has(NamespaceKind::Pid));
        blocking(move || Ok(processes::describe(&cgroup.pids()?, level))).await
    }

    /// Stops all processes of the container until [`Self::resume`].
    ///
    /// # Errors
    ///
    /// The container has ended or is paused, or a process does not stop.
    pub(crate) async fn pause(&self) -> Result<()> {
        self.check_not_ended()?;
        let cgroup = Arc::clone(&self.cgroup);
        blocking(move || cgroup.pause()).await
    }

    /// Lets all processes of a paused container go on.
    ///
    /// # Errors
    ///
    /// The container has ended or is not paused.
    pub(crate) async fn resume(&self) -> Result<()> {
        self.check_not_ended()?;
        let cgroup = Arc::clone(&self.cgroup);
        blocking(move || cgroup.resume()).await
    }

    /// Changes the limits of the container.
    ///
    /// # Errors
    ///
    /// The container has ended, or a limit cannot be honoured; none is changed then.
    pub(crate) async fn update(&self, resources_json: Vec<u8>) -> Result<()> {
        self.check_not_ended()?;
        let cgroup = Arc::clone(&self.cgroup);
        blocking(move || resources::update(&cgroup, &resources_json)).await
    }

    /// What the container uses, and what it may.
    ///
    /// # Errors
    ///
    /// The cgroup cannot be read.
    pub(crate) async fn stats(&self) -> Result<ContainerStats> {
        let (cgroup, pid) = (Arc::clone(&self.cgroup), self.init.pid());
        blocking(move || stats::read(&cgroup, pid)).await
    }

    /// Waits until the count of processes that the kernel has killed for the memory limit is not
    /// `seen`, or the container has ended. Returns the count, and whether it has.
    ///
    /// # Errors
    ///
    /// The cgroup cannot be watched.
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
        if self.init.has_ended() {
            return Err(Error::state(format!("container {:?} has ended", self.id)));
        }
        Ok(())
    }

    /// Kills all processes of the container, unless the first one has ended, and waits for that end.
    ///
    /// # Errors
    ///
    /// The cgroup cannot be used.
    pub(crate) async fn end(&self) -> Result<()> {
        if self.init.has_ended() {
            return Ok(());
        }
        let cgroup = Arc::clone(&self.cgroup);
        blocking(move || match cgroup.kill() {
            // Removed while it was created, with all that was in it.
            Err(_) if !cgroup.path().exists() => Ok(()),
            result => result,
        })
        .await?;
        self.init.wait().await;
        Ok(())
    }

    /// Removes what is left of a container whose first process has ended.
    ///
    /// # Errors
    ///
    /// It has not ended, or something cannot be removed.
    pub(crate) async fn remove(&self) -> Result<()> {
        if !self.init.has_ended() {
            return Err(Error::state(format!("container {:?} has not ended", self.id)));
        }
        let cgroup = Arc::clone(&self.cgroup);
        blocking(move || cgroup.remove()).await
    }

    fn execs(&self) -> MutexGuard<'_, Execs> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The part of a creation that blocks.
fn prepare(
    reaper: &Reaper,
    cgroup: &Cgroup,
    spec: &ContainerSpec,
    birth: Birth<'_>,
    document: Document,
    streams: Vec<OwnedFd>,
    screen: Screen,
) -> Result<Launched> {
    let path = cgroup.path().to_string_lossy().into_owned();
    let Document { spec_json, state, filter } = document;
    let request = Request::Create { cgroup: path, filter, screen, state };
    resources::apply(cgroup, &spec.linux.resources)?;
    launch::launch(
        reaper,
        Launch {
            patience: spec.hooks_limit().and_then(|limit| limit.checked_add(launch::PATIENCE)),
            birth,
            cgroup,
            request,
            document: &spec_json,
            streams,
            oom_score_adj: spec.process.oom_score_adj.unwrap_or(0),
            rlimits: spec.process.rlimits.as_deref().unwrap_or_default(),
        },
    )
}

/// Without a pid namespace nothing else ends the container's other processes with the first one.
fn kill_rest_at_exit(init: Arc<Process>, cgroup: Arc<Cgroup>) {
    tokio::spawn(async move {
        init.wait().await;
        if let Err(e) = cgroup.kill() {
            log_warn!("{e}");
        }
    });
}

/// The group is frozen, so the pid cannot be anybody else's by now.
fn signal_pid(pid: u32, signal: i32) {
    let Ok(pid) = libc::pid_t::try_from(pid) else { return };
    // SAFETY: plain numbers are passed. A process that has just been killed is no error.
    unsafe { libc::kill(pid, signal) };
}

/// Does what blocks on a thread for that.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::internal(e.to_string()))?
}

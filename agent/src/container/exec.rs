//! Further processes of a running container.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use super::channel::InitRequest;
use super::clone::Parent;
use super::launch::{self, Launch, Launched};
use super::process::Process;
use super::stdio::{Connections, Pipes};
use super::terminal::Screen;
use super::{Container, blocking, spec};
use crate::error::{Error, Result};
use crate::oci::ProcessSpec;
use crate::pump::Late;
use crate::reaper::Reaper;

/// The id of a further process that is being set up. Dropping it gives the id back, unless the
/// process has started.
pub(crate) struct Reservation {
    container: Arc<Container>,
    exec_id: String,
    number: u64,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.container.execs().cancel(&self.exec_id, self.number);
    }
}

impl Reservation {
    /// Starts the process and returns its pid. After a deletion the process is killed, as far as
    /// there is one, and the call fails.
    pub(crate) async fn exec(
        self,
        reaper: Arc<Reaper>,
        process_json: Vec<u8>,
        cgroup: Option<String>,
        connections: Connections,
        screen: Screen,
    ) -> Result<i32> {
        let Self { container, exec_id, number } = &self;
        container.execs().check(exec_id, *number)?;
        let process = container.prepare_exec(reaper, process_json, cgroup, connections, screen);
        let process = process.await?;
        container.execs().put(exec_id, *number, &process)?;
        process.start().await?;
        container.execs().started(exec_id, *number)?;
        Ok(process.pid())
    }
}

impl Container {
    /// Reserves the id of a further process. An id that is in use is an error.
    pub(crate) fn reserve_exec(self: &Arc<Self>, exec_id: String) -> Result<Reservation> {
        let number = self.execs().reserve(&exec_id)?;
        Ok(Reservation { container: Arc::clone(self), exec_id, number })
    }

    /// Kills a further process, unless it has ended, and forgets it. A missing process is no error.
    ///
    /// Only the process itself is killed: `exec` leaves descendants behind at any end of it.
    pub(crate) fn delete_exec(&self, exec_id: &str) -> Result<()> {
        self.execs().delete(exec_id)
    }

    /// Brings a further process up to the point just before `execve`.
    async fn prepare_exec(
        self: &Arc<Self>,
        reaper: Arc<Reaper>,
        process_json: Vec<u8>,
        cgroup: Option<String>,
        connections: Connections,
        screen: Screen,
    ) -> Result<Arc<Process>> {
        if self.init.has_ended() {
            return Err(Error::state(format!("container {:?} is not running", self.id)));
        }
        let oom_kills = self.cgroup.oom_kills();
        let process = spec::parse_process(&process_json)?;
        let (pipes, streams) = Pipes::make(&connections, process.terminal)?;
        let container = Arc::clone(self);
        let launch = move || container.launch_exec(&reaper, process, cgroup, streams, screen);
        let launched = blocking(launch).await?;
        let cgroup = Arc::clone(&self.cgroup);
        let late = Late::PassedOn;
        let process = Process::new(launched, cgroup, oom_kills, pipes, connections, late)?;
        Ok(Arc::new(process))
    }

    /// Clones the process and waits until it is ready. Blocks.
    fn launch_exec(
        &self,
        reaper: &Reaper,
        mut process: ProcessSpec,
        cgroup: Option<String>,
        streams: Vec<OwnedFd>,
        screen: Screen,
    ) -> Result<Launched> {
        if process.capabilities.is_none() {
            process.capabilities = self.defaults.capabilities.clone();
        }
        if process.no_new_privileges.is_none() {
            process.no_new_privileges = self.defaults.no_new_privileges;
        }
        if process.rlimits.is_none() {
            process.rlimits = Some(self.defaults.rlimits.clone());
        }
        let document = serde_json::to_vec(&process).map_err(|e| Error::internal(e.to_string()))?;
        let group = cgroup.map(|path| self.cgroup.below(&path)).transpose()?;
        launch::launch(
            reaper,
            Launch {
                step_timeout: Some(launch::STEP_TIMEOUT),
                parent: Parent::Join {
                    group: group.as_ref().map(OwnedFd::as_fd),
                    namespaces: self.namespaces,
                    init: self.init.pidfd().as_fd(),
                    init_pid: self.init.pid(),
                },
                cgroup: &self.cgroup,
                request: InitRequest::Exec {
                    namespaces: self.namespaces,
                    filter: self.defaults.filter.clone(),
                    personality: self.defaults.personality,
                    screen,
                },
                document: &document,
                streams,
                oom_score_adj: process.oom_score_adj.unwrap_or(self.defaults.oom_score_adj),
                rlimits: process.rlimits.as_deref().unwrap_or_default(),
            },
        )
    }
}

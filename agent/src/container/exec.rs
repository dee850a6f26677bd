//! Further processes of a running container.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Weak};

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

/// Ownership of a further process. Dropping it kills the process, unless the process has ended.
pub(crate) struct Hold {
    // Weak, so that a deleted container and its descriptors go before the owners of its processes.
    container: Weak<Container>,
    exec_id: String,
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(container) = self.container.upgrade() {
            container.execs().release(&self.exec_id);
        }
    }
}

impl Container {
    /// Takes ownership of a further process that is to be started. A second owner is refused.
    pub(crate) fn hold(self: &Arc<Self>, exec_id: String) -> Result<Hold> {
        self.execs().hold(&exec_id)?;
        Ok(Hold { container: Arc::downgrade(self), exec_id })
    }

    /// Starts a further process and returns its pid.
    pub(crate) async fn exec(
        self: &Arc<Self>,
        reaper: Arc<Reaper>,
        exec_id: String,
        process_json: Vec<u8>,
        cgroup: Option<String>,
        connections: Connections,
        screen: Screen,
    ) -> Result<i32> {
        self.execs().reserve(&exec_id)?;
        match self.start_exec(reaper, process_json, cgroup, connections, screen).await {
            Ok(process) => {
                let pid = process.pid();
                self.execs().put(exec_id, process);
                Ok(pid)
            }
            Err(e) => {
                self.execs().forget(&exec_id);
                Err(e)
            }
        }
    }

    async fn start_exec(
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
        let process = Arc::new(process);
        process.start().await?;
        Ok(process)
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

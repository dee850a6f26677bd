//! The sandbox of a pod, if containerd leaves the pod's first container to the shim.
//!
//! ```text
//!          CreateSandbox           StartSandbox         StopSandbox, end of the microVM
//!   Absent ─────────────► Created ─────────────► Ready ────────────────────────────────► Stopped
//!                            └───────────────────── StopSandbox ────────────────────────────┘
//! ```
//!
//! A holder is the first container of the microVM: it is made, and never started. Its namespaces are
//! the pod's, and its end is the end of the pod. It is no task: containerd does not know of it.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{
    sandbox_api::SandboxStatusResponse,
    ttrpc::{Code, Result},
};
use serde_json::json;
use tokio::{sync::watch, time::timeout};

use crate::{
    bundle::PodFiles,
    container_id::ContainerId,
    containerd::{messages::timestamp, parked::Parked, pod::Pod, process::Exited, status::status},
    engine::{Container, Record},
    state::StateDir,
};

/// States of a pod, by their names in CRI.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// Key of the information that `crictl inspectp` shows.
const INFO: &str = "info";

/// Longest time for the end of the sandbox to be known, once its microVM has ended.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// The sandbox of a shim.
#[derive(Default)]
pub(super) struct PodSandbox {
    phase: watch::Sender<Phase>,
    /// Held while the sandbox is created, started or stopped.
    pub(super) order: tokio::sync::Mutex<()>,
}

/// The state of a sandbox.
#[derive(Clone, Default)]
pub(super) enum Phase {
    /// containerd has asked for none.
    #[default]
    Absent,
    /// It has no microVM yet.
    Created(Arc<Plan>),
    /// Containers can be made in its microVM.
    Ready(Arc<Ready>),
    /// Its microVM has ended, or never came.
    Stopped(Arc<Stopped>),
}

/// A sandbox that is to be started.
pub(super) struct Plan {
    pub(super) id: ContainerId,
    /// The bundle of the holder.
    pub(super) bundle: PathBuf,
    pub(super) files: PodFiles,
}

/// A sandbox that runs.
pub(super) struct Ready {
    pub(super) id: ContainerId,
    pub(super) created: SystemTime,
    pub(super) pod: Arc<Pod>,
    /// The holder.
    pub(super) container: Container,
    /// State directory of the holder.
    pub(super) dir: Arc<StateDir>,
    /// Has the pid that stands for the sandbox.
    pub(super) parked: Parked,
    /// True once containerd has wanted the sandbox to stop.
    pub(super) stopping: AtomicBool,
}

/// A sandbox that has ended.
pub(super) struct Stopped {
    pub(super) id: ContainerId,
    /// The start, if it was started.
    pub(super) created: Option<SystemTime>,
    pub(super) exited: Exited,
    /// State directory of the holder, if it was started.
    pub(super) dir: Option<Arc<StateDir>>,
}

impl Phase {
    fn id(&self) -> Option<&ContainerId> {
        match self {
            Self::Absent => None,
            Self::Created(plan) => Some(&plan.id),
            Self::Ready(ready) => Some(&ready.id),
            Self::Stopped(stopped) => Some(&stopped.id),
        }
    }
}

impl Ready {
    /// The pid of the host that stands for the sandbox.
    pub(super) fn pid(&self) -> u32 {
        self.parked.pid().unsigned_abs()
    }

    /// What `crictl inspectp` shows, as JSON.
    fn info(&self) -> String {
        let record = Record::read(&self.dir).ok().flatten();
        let microvm = record.map(|record| {
            json!({
                "vcpus": record.vm.vcpus,
                "memoryMib": record.vm.memory_mib,
                "vmmPid": record.vmm.map(|vmm| vmm.pid),
            })
        });
        let version = env!("CARGO_PKG_VERSION");
        let info = json!({
            "sandboxID": self.id.as_str(),
            "pid": self.pid(),
            "shimPid": std::process::id(),
            "stateDir": self.dir.path(),
            "microvm": microvm,
            "version": version,
        });
        info.to_string()
    }
}

impl PodSandbox {
    /// The state of the sandbox of this id.
    ///
    /// # Errors
    ///
    /// If there is no such sandbox.
    pub(super) fn phase(&self, id: &str) -> Result<Phase> {
        let phase = self.phase.borrow().clone();
        if phase.id().is_some_and(|known| known.as_str() == id) {
            return Ok(phase);
        }
        Err(status(Code::NOT_FOUND, format!("there is no sandbox {id}")))
    }

    /// The sandbox of this id, which runs.
    ///
    /// # Errors
    ///
    /// If there is no such sandbox, or if it does not run.
    pub(super) fn ready(&self, id: &str) -> Result<Arc<Ready>> {
        match self.phase(id)? {
            Phase::Ready(ready) => Ok(ready),
            phase => Err(not_ready(&phase)),
        }
    }

    /// Tells whether containerd has asked for a sandbox.
    pub(super) fn exists(&self) -> bool {
        !matches!(*self.phase.borrow(), Phase::Absent)
    }

    /// Refuses a container if the sandbox does not run.
    pub(super) fn check_ready(&self) -> Result<()> {
        match &*self.phase.borrow() {
            Phase::Ready(_) => Ok(()),
            phase => Err(not_ready(phase)),
        }
    }

    /// Refuses a pod of its own for a container if there is a sandbox.
    pub(super) fn check_absent(&self) -> Result<()> {
        match &*self.phase.borrow() {
            Phase::Absent => Ok(()),
            phase => Err(not_ready(phase)),
        }
    }

    /// Tells whether the sandbox waits to be started.
    pub(super) fn is_unused(&self) -> bool {
        // Locked while it is being started.
        matches!(*self.phase.borrow(), Phase::Created(_)) && self.order.try_lock().is_ok()
    }

    /// Changes the state.
    pub(super) fn set(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }

    /// The pid that stands for a running sandbox, and the id of its holder.
    pub(super) fn pid(&self) -> Option<(i32, ContainerId)> {
        match &*self.phase.borrow() {
            Phase::Ready(ready) => Some((ready.parked.pid(), ready.id.clone())),
            _ => None,
        }
    }

    /// Waits for the end of the sandbox.
    pub(super) async fn stopped(&self) -> Arc<Stopped> {
        let mut phase = self.phase.subscribe();
        loop {
            if let Phase::Stopped(stopped) = &*phase.borrow_and_update() {
                return Arc::clone(stopped);
            }
            // The sender is there as long as this.
            let _ = phase.changed().await;
        }
    }

    /// Has those who wait hear of the end, when the shim ends. The microVM is gone.
    pub(super) async fn close(&self) {
        if self.pid().is_some() {
            let _ = timeout(END_TIMEOUT, self.stopped()).await;
        }
    }

    /// The state as containerd asks for it. With `verbose`, there is more for `crictl inspectp`.
    pub(super) fn status(&self, id: &str, verbose: bool) -> Result<SandboxStatusResponse> {
        let mut answer = SandboxStatusResponse {
            sandbox_id: id.to_owned(),
            state: NOT_READY.to_owned(),
            ..SandboxStatusResponse::default()
        };
        match self.phase(id)? {
            Phase::Absent | Phase::Created(_) => {}
            Phase::Ready(ready) => {
                answer.state = READY.to_owned();
                answer.pid = ready.pid();
                answer.created_at = Some(timestamp(ready.created)).into();
                if verbose {
                    answer.info.insert(INFO.to_owned(), ready.info());
                }
            }
            Phase::Stopped(stopped) => {
                answer.created_at = stopped.created.map(timestamp).into();
                answer.exited_at = Some(timestamp(stopped.exited.at)).into();
            }
        }
        Ok(answer)
    }
}

impl Ready {
    /// Notes that the sandbox is to stop, so that its end is no failure.
    pub(super) fn note_stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// Tells whether the end of the sandbox is no failure.
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }
}

fn not_ready(phase: &Phase) -> containerd_shim_protos::ttrpc::Error {
    let text = match phase {
        Phase::Absent => "there is no sandbox".to_owned(),
        Phase::Created(plan) => format!("sandbox {} has not been started", plan.id),
        Phase::Ready(ready) => format!("sandbox {} has been started before", ready.id),
        Phase::Stopped(stopped) => format!("sandbox {} has ended", stopped.id),
    };
    status(Code::FAILED_PRECONDITION, text)
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::ttrpc::Error;

    use super::*;

    fn code<T>(result: Result<T>) -> Code {
        match result.err().unwrap() {
            Error::RpcStatus(status) => status.code.enum_value().unwrap(),
            other => panic!("{other}"),
        }
    }

    fn plan(dir: &std::path::Path) -> Phase {
        let files = PodFiles::write(dir, "web", None).unwrap();
        let id = ContainerId::parse("p").unwrap();
        Phase::Created(Arc::new(Plan { id, bundle: dir.to_owned(), files }))
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_sandbox_goes_one_way() {
        let sandbox = PodSandbox::default();
        assert_eq!(code(sandbox.status("p", false)), Code::NOT_FOUND);
        assert!(!sandbox.exists() && sandbox.check_absent().is_ok());
        let dir = tempfile::tempdir().unwrap();
        sandbox.set(plan(dir.path()));
        assert_eq!(code(sandbox.phase("other")), Code::NOT_FOUND);
        assert_eq!(code(sandbox.ready("p")), Code::FAILED_PRECONDITION);
        // No container comes before the start, and none gets a pod of its own.
        assert!(sandbox.check_ready().is_err() && sandbox.check_absent().is_err());
        assert_eq!(sandbox.status("p", true).unwrap().state, NOT_READY);
        assert!(sandbox.is_unused());
        let order = sandbox.order.lock().await;
        assert!(!sandbox.is_unused());
        drop(order);
        let exited = Exited { status: 7, at: SystemTime::UNIX_EPOCH };
        let id = ContainerId::parse("p").unwrap();
        let stopped = Stopped { id, created: None, exited, dir: None };
        sandbox.set(Phase::Stopped(Arc::new(stopped)));
        assert_eq!(sandbox.stopped().await.exited, exited);
        let answer = sandbox.status("p", true).unwrap();
        assert!(answer.state == NOT_READY && answer.exited_at.is_some());
        assert!(answer.created_at.is_none() && answer.info.is_empty());
        assert!(!sandbox.is_unused());
    }
}

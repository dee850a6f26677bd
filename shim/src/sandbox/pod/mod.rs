//! A container that lives in the microVM of another one, the first of its pod.
//!
//! ```text
//!  first container: sandbox process ── VMM ──► guest: agent ─┬─ first container
//!     │ its mount namespace: the share                 ▲     └─ second container: joins namespaces
//!     │   <first>/..., <second>/...                    │
//!  second container: sandbox process ── vsock.sock ────┘
//! ```
//!
//! It has a sandbox process, a state directory and a cgroup of its own, so it is created, started,
//! signalled, paused, entered and deleted like any other. Its `vsock.sock` is a link to that of the
//! first container, and what it shares with the guest is attached to the share that is there. When the
//! first container ends, so do the microVM and all that live in it.

mod share;

use std::{
    collections::{HashMap, hash_map::Entry},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use oci_spec::runtime::LinuxNamespaceType;
use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time::timeout};

pub(super) use self::share::{Origin, PodShare};
use super::{agent::Agent, control::Ended, ending::ContainerEnd};
use crate::{
    bundle::{Joined, VmSize, beyond_vm, check_fits},
    error::{Error, ErrorKind, Explain, Result},
    network::Namespace,
    state::{Id, ProcessId, Record, StateDir, Status, VSOCK_SOCKET, ids},
};

/// How long the guest may take to end a container and to forget it: with the time that a process has to
/// die, less than whoever forces a deletion waits for.
const DELETE_TIMEOUT: Duration = Duration::from_secs(15);

/// The microVM that a container of a pod lives in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// The container that the microVM was made for.
    pub sandbox: Id,
    /// That container's state directory.
    pub dir: PathBuf,
    /// Its sandbox process, which owns the VMM and the share.
    pub process: ProcessId,
}

/// What a container shares with others of its pod.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Membership {
    /// Where it lives.
    pub pod: Pod,
    /// The size of that microVM.
    pub vm: VmSize,
    /// Whose namespaces it shares.
    pub joins: Vec<(LinuxNamespaceType, Id)>,
}

impl Membership {
    /// Looks among the containers below `root` for those whose namespaces are to be shared. None if
    /// there are no such namespaces.
    ///
    /// # Errors
    ///
    /// If a process is no such container's, or they live in several microVMs.
    pub fn find(root: &Path, joined: &[Joined]) -> Result<Option<Self>> {
        let mut found: Option<Self> = None;
        // One container for all kinds, as a rule.
        let mut records: HashMap<i32, Record> = HashMap::new();
        for Joined { kind, pid } in joined {
            let record = match records.entry(*pid) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => new.insert(record_of(root, *pid)?),
            };
            let pod = record.pod.clone().unwrap_or_else(|| Pod {
                sandbox: record.id.clone(),
                dir: root.join(record.id.as_str()),
                process: record.sandbox,
            });
            let membership = found.get_or_insert_with(|| Self {
                pod: pod.clone(),
                vm: record.vm,
                joins: Vec::new(),
            });
            if membership.pod != pod {
                return Err(Error::new(format!(
                    "linux.namespaces: {} and {} live in microVMs of their own, so one container \
                     cannot share namespaces with both",
                    membership.pod.sandbox, pod.sandbox
                )));
            }
            membership.joins.push((*kind, record.id.clone()));
        }
        Ok(found)
    }

    /// Checks what a container asks for that a microVM which runs cannot be given.
    ///
    /// # Errors
    ///
    /// What it is.
    pub fn check(&self, network: &Namespace, spec: &oci_spec::runtime::Spec) -> Result<()> {
        if let Namespace::Path(path) = network {
            return Err(Error::new(format!(
                "linux.namespaces: the network namespace {} is not that of the container's pod, whose \
                 microVM runs already and takes no more network devices: share the pod's network",
                path.display()
            )));
        }
        let annotations = spec.annotations().iter().flatten();
        for (key, _) in annotations.filter(|(key, _)| key.starts_with("dev.isopod.")) {
            log::warn!(
                "annotation {key} has no effect: the microVM is that of container {}",
                self.pod.sandbox
            );
        }
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let Some(resources) = resources else { return Ok(()) };
        for beyond in beyond_vm(resources, self.vm) {
            log::warn!("{beyond}");
        }
        check_fits(resources, self.vm)
    }
}

/// The container whose pid on the host is `pid`.
fn record_of(root: &Path, pid: i32) -> Result<Record> {
    for id in ids(root)? {
        // One that is being made or removed is none to share with.
        let record = StateDir::open(root, &id).and_then(|dir| dir.record());
        let Ok(Some(record)) = record else { continue };
        if record.sandbox.pid == pid && record.sandbox.is_alive() {
            return match record.status {
                Status::Creating | Status::Stopped => Err(Error::new(format!(
                    "linux.namespaces: the namespaces of container {id} cannot be shared: it is {}",
                    record.status
                ))),
                Status::Created | Status::Running | Status::Paused => Ok(record),
            };
        }
    }
    Err(Error::new(format!(
        "linux.namespaces: process {pid} is no container's in {}: the containers of a pod share a \
         microVM, so all of them have to run under isopod",
        root.display()
    )))
}

/// The microVM of a pod, for a container in it that it was not made for.
#[derive(Debug)]
pub(super) struct PodVm {
    pod: Pod,
    /// The container.
    id: Id,
    end: watch::Receiver<Option<PodEnd>>,
    share: Option<Box<PodShare>>,
}

/// How the microVM of a pod has ended.
#[derive(Debug, Clone)]
pub(super) struct PodEnd {
    /// Why, for a person.
    pub(super) why: String,
    /// Its first container has ended as containers do.
    pub(super) in_order: bool,
}

impl PodVm {
    /// Connects a container, whose state directory is `dir`, with the microVM that it is to live in.
    ///
    /// # Errors
    ///
    /// If that microVM is ending or gone.
    pub(super) async fn enter(dir: &StateDir, id: &Id, pod: &Pod, share: PodShare) -> Result<Self> {
        let gone =
            || Error::new(format!("the microVM of container {} is ending or gone", pod.sandbox));
        let sandbox = StateDir::open_path(&pod.dir)?;
        sandbox.check_protocols()?;
        let end = ContainerEnd::watch(&sandbox).await.map_err(|error| {
            log::debug!("{error}");
            gone()
        })?;
        // As long as it lives the directory is its own.
        if !pod.process.is_alive() {
            return Err(gone());
        }
        let link = dir.short_path(VSOCK_SOCKET);
        symlink(pod.dir.join(VSOCK_SOCKET), &link)
            .explain(|| format!("cannot make {}", dir.path().join(VSOCK_SOCKET).display()))?;
        let (tell, heard) = watch::channel(None);
        let sandbox = pod.sandbox.clone();
        tokio::spawn(async move {
            let ended = end.heard().await;
            tell.send_replace(Some(PodEnd::of(&sandbox, ended)));
        });
        Ok(Self { pod: pod.clone(), id: id.clone(), end: heard, share: Some(Box::new(share)) })
    }

    /// Waits for the end of the microVM.
    pub(super) async fn ended(&self) -> PodEnd {
        let mut end = self.end.clone();
        match end.wait_for(Option::is_some).await.map(|end| end.clone()) {
            Ok(Some(end)) => end,
            // The task that tells cannot end without having told.
            _ => PodEnd::of(&self.pod.sandbox, None),
        }
    }

    /// Ends the container there, or its creation, and takes what it shares out of the share.
    pub(super) async fn leave(&mut self) {
        if self.end.borrow().is_none()
            && let Err(error) = self.pod.end_container(&self.id).await
        {
            log::warn!("{error}");
        }
        // Its mounts go now.
        self.share = None;
    }
}

impl PodEnd {
    fn of(sandbox: &Id, ended: Option<Ended>) -> Self {
        let why = format!("the microVM of the pod has ended with its first container, {sandbox}");
        let in_order = ended.as_ref().is_some_and(|ended| ended.exit.is_some());
        match ended.and_then(|ended| ended.error) {
            Some(error) => Self { why: format!("{why}: {}", error.message), in_order },
            None => Self { why, in_order },
        }
    }
}

impl Pod {
    /// Removes what is left in the microVM and its share of a container whose sandbox process is gone.
    /// A guest that does not end the container keeps nobody from removing the rest: with the pod it ends.
    ///
    /// # Errors
    ///
    /// If a mount cannot be removed.
    pub(crate) async fn clean_up(&self, id: &Id) -> Result<()> {
        // Gone, with all that was in it.
        if !self.process.is_alive() {
            return Ok(());
        }
        if let Err(error) = self.end_container(id).await {
            log::warn!("{error}");
        }
        PodShare::of(self, id).remove()
    }

    /// Has the guest end and forget a container, by a connection for that alone.
    async fn end_container(&self, id: &Id) -> Result<()> {
        let asked = timeout(DELETE_TIMEOUT, async {
            let dir = StateDir::open_path(&self.dir)?;
            dir.check_protocols()?;
            Agent::connect(&dir, id, String::new()).await?.delete_container().await
        });
        match asked.await {
            // With the microVM it is gone as well.
            Ok(Err(error)) if error.kind == ErrorKind::VmLost => Ok(()),
            Ok(result) => result,
            Err(_) => Err(Error::new(format!(
                "the guest did not end container {id} within {} seconds: it ends with the microVM \
                 of its pod",
                DELETE_TIMEOUT.as_secs()
            ))),
        }
    }
}

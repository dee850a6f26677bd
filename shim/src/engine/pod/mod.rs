//! A container that lives in the microVM of another container, the first of its pod.
//!
//! ```text
//!  first container: sandbox process ── VMM ──► guest: agent ─┬─ first container
//!     │ its mount namespace: the share                 ▲     └─ second container: joins namespaces
//!     │   <first>/..., <second>/...                    │
//!  second container: sandbox process ── vsock.sock ────┘
//! ```
//!
//! The container has a sandbox process, a state directory and a cgroup of its own. So it is
//! created, started, signalled, paused, entered and deleted like any other. Its `vsock.sock` is a
//! link to that of the first container. Its trees are attached to the first container's share. When
//! the first container ends, the microVM ends with all containers in it.

mod share;

use std::{
    collections::{HashMap, hash_map::Entry},
    os::unix::fs::symlink,
    path::Path,
    time::Duration,
};

use oci_spec::runtime::LinuxNamespaceType;
use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time::timeout};

pub(crate) use self::share::PodShare;
use crate::{
    bundle::{Joined, NetworkNamespace, VmSize, beyond_vm, check_fits},
    container_id::ContainerId,
    control::{Ended, versions, wait::ContainerEnd},
    engine::record::{Pod, Record},
    error::{Error, ErrorKind, Explain, Result},
    microvm::agent::Agent,
    state::{StateDir, Status, VSOCK_SOCKET, ids},
};

/// Longest time for the guest to end and forget a container. Together with the time that a process
/// has to die, this is less than a forced deletion waits.
const DELETE_TIMEOUT: Duration = Duration::from_secs(15);

/// The pod of a container, and the namespaces that the container shares.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Membership {
    /// The microVM that the container lives in.
    pub pod: Pod,
    /// Size of this microVM.
    pub vm: VmSize,
    /// The shared namespaces, each with the container that it comes from.
    pub joins: Vec<(LinuxNamespaceType, ContainerId)>,
}

impl Membership {
    /// Looks among the containers below `root` for those whose namespaces are to be shared. `None`
    /// if no namespaces are to be shared.
    ///
    /// # Errors
    ///
    /// If a process belongs to no container, or the containers live in several microVMs.
    pub fn find(root: &Path, joined: &[Joined]) -> Result<Option<Self>> {
        let mut found: Option<Self> = None;
        // As a rule one container has the namespaces of all kinds.
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

    /// Refuses a network or limits that a running microVM cannot provide.
    pub fn check(&self, network: &NetworkNamespace, spec: &oci_spec::runtime::Spec) -> Result<()> {
        if let NetworkNamespace::Path(path) = network {
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

/// The record of the container whose pid on the host is `pid`.
fn record_of(root: &Path, pid: i32) -> Result<Record> {
    for id in ids(root)? {
        // A container that is being made or removed has no namespaces to share.
        let record = StateDir::open(root, &id).and_then(|dir| Record::read(&dir));
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

/// The microVM of a pod, for a member of the pod.
#[derive(Debug)]
pub(crate) struct PodVm {
    pod: Pod,
    /// Id of the member.
    id: ContainerId,
    end: watch::Receiver<Option<PodEnd>>,
    share: Option<Box<PodShare>>,
}

/// The end of a pod's microVM.
#[derive(Debug, Clone)]
pub(crate) struct PodEnd {
    /// The reason, in words.
    pub(crate) why: String,
    /// True if the first container ended in order.
    pub(crate) in_order: bool,
}

impl PodVm {
    /// Connects a member with the microVM of its pod. `dir` is the member's state directory. Fails
    /// if the microVM is ending or gone.
    pub(crate) async fn enter(
        dir: &StateDir,
        id: &ContainerId,
        pod: &Pod,
        share: PodShare,
    ) -> Result<Self> {
        let gone =
            || Error::new(format!("the microVM of container {} is ending or gone", pod.sandbox));
        let sandbox = StateDir::open_path(&pod.dir)?;
        versions::check(&sandbox)?;
        let end = ContainerEnd::watch(&sandbox).await.map_err(|error| {
            log::debug!("{error}");
            gone()
        })?;
        // The first container's sandbox process still lives, so the directory is its own.
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
    pub(crate) async fn ended(&self) -> PodEnd {
        let mut end = self.end.clone();
        match end.wait_for(Option::is_some).await.map(|end| end.clone()) {
            Ok(Some(end)) => end,
            // Unreachable: the task that reports the end cannot end before it has reported it.
            _ => PodEnd::of(&self.pod.sandbox, None),
        }
    }

    /// Ends the member in the guest, or its creation, and removes its trees from the share.
    pub(crate) async fn leave(&mut self) {
        if self.end.borrow().is_none()
            && let Err(error) = self.pod.end_container(&self.id).await
        {
            log::warn!("{error}");
        }
        // The drop unmounts the trees.
        self.share = None;
    }
}

impl PodEnd {
    fn of(sandbox: &ContainerId, ended: Option<Ended>) -> Self {
        let why = format!("the microVM of the pod has ended with its first container, {sandbox}");
        let in_order = ended.as_ref().is_some_and(|ended| ended.exit.is_some());
        match ended.and_then(|ended| ended.error) {
            Some(error) => Self { why: format!("{why}: {}", error.message), in_order },
            None => Self { why, in_order },
        }
    }
}

impl Pod {
    /// Removes the remains of a member from the microVM and the share, after its sandbox process
    /// has gone. Fails if a mount cannot be removed.
    ///
    /// A guest that does not end the member keeps nobody from removing the rest: the member ends
    /// with the pod.
    pub(crate) async fn clean_up(&self, id: &ContainerId) -> Result<()> {
        // The microVM is gone, with everything in it.
        if !self.process.is_alive() {
            return Ok(());
        }
        if let Err(error) = self.end_container(id).await {
            log::warn!("{error}");
        }
        PodShare::of(self.process, &self.dir, id).remove()
    }

    /// Has the guest end and forget a container, over a connection for this call alone.
    async fn end_container(&self, id: &ContainerId) -> Result<()> {
        let asked = timeout(DELETE_TIMEOUT, async {
            let dir = StateDir::open_path(&self.dir)?;
            versions::check(&dir)?;
            Agent::connect(&dir, id, String::new()).await?.delete_container().await
        });
        match asked.await {
            // The container is gone with the microVM.
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

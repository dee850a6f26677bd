//! The pod of a container: the containers of a pod share namespaces, and therefore a microVM.
//!
//! ```text
//!  first container: sandbox process ── VMM ──► guest: agent ─┬─ first container
//!        ▲            control.sock                           └─ second container: joins namespaces
//!        │ create, signals, end
//!  second container: process with its pid and its exit status
//! ```
//!
//! The second container has a process, a state directory and a cgroup of its own. The sandbox
//! process of the first owns both containers, so the calls about both go to its control socket.

use std::{
    collections::{HashMap, hash_map::Entry},
    path::Path,
};

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde::{Deserialize, Serialize};

use crate::{
    bundle::{
        ANNOTATION_PREFIX, Bundle, Holder, Joined, NetworkNamespace, POD_ID, VmSize, beyond_vm,
        check_fits, is_first_of_pod, is_same_namespace,
    },
    container_id::ContainerId,
    engine::{Pod, Record, records},
    error::{Error, Result},
    state::{StateDir, Status, versions},
};

/// The pod of a container, and the namespaces that the container shares.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Membership {
    /// The microVM that the container lives in.
    pub pod: Pod,
    /// Size of this microVM.
    pub vm: VmSize,
    /// The shared namespaces, each with the container that it comes from.
    pub joins: Vec<(LinuxNamespaceType, ContainerId)>,
}

impl Membership {
    /// Looks among the containers below `root` for those whose namespaces are to be shared. `None`
    /// if no namespaces are to be shared, or those of a pod that has no microVM.
    ///
    /// # Errors
    ///
    /// If a process belongs to no container, or the containers live in several microVMs.
    pub(crate) fn find(root: &Path, joined: &[Joined]) -> Result<Option<Self>> {
        let mut found: Option<Self> = None;
        // As a rule one container has the namespaces of all kinds.
        let mut records: HashMap<&Holder, Option<Record>> = HashMap::new();
        for Joined { kind, holder } in joined {
            let record = match (records.entry(holder), holder) {
                (Entry::Occupied(known), _) => known.into_mut(),
                (Entry::Vacant(new), Holder::Process(pid)) => {
                    new.insert(Some(record_of(root, *pid)?))
                }
                (Entry::Vacant(new), Holder::Pod(id)) => new.insert(first_of(root, id)?),
            };
            let Some(record) = record else { continue };
            let pod = record.pod.clone().unwrap_or_else(|| Pod {
                sandbox: record.id.clone(),
                dir: root.join(record.id.as_str()),
                process: record.sandbox,
                holder: record.holder,
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

    /// Gives a container the size and the network of its pod.
    ///
    /// # Errors
    ///
    /// If the container asks for a network or for limits that the running microVM cannot provide.
    pub(crate) fn fit(&self, bundle: &mut Bundle) -> Result<()> {
        if let NetworkNamespace::Path(path) = &bundle.network {
            let shared = self.joins.iter().any(|(kind, _)| *kind == LinuxNamespaceType::Network);
            if !shared || !self.is_the_pods(path) {
                return Err(Error::new(format!(
                    "linux.namespaces: the network namespace {} is not that of the container's pod, \
                     whose microVM runs already and takes no more network devices: share the pod's \
                     network",
                    path.display()
                )));
            }
            bundle.network = NetworkNamespace::Pod(path.clone());
        }
        self.check_limits(&bundle.spec)?;
        bundle.vm = self.vm;
        Ok(())
    }

    /// Tells whether `path` is the network namespace that the microVM has its interfaces from.
    fn is_the_pods(&self, path: &Path) -> bool {
        let record = StateDir::open_path(&self.pod.dir).and_then(|dir| Record::read(&dir));
        let Ok(Some(record)) = record else { return false };
        is_same_namespace(path, Path::new(&format!("/proc/{}/ns/net", record.pid)))
    }

    /// Refuses limits that a running microVM cannot provide.
    fn check_limits(&self, spec: &Spec) -> Result<()> {
        let annotations = spec.annotations().iter().flatten();
        for (key, _) in annotations.filter(|(key, _)| key.starts_with(ANNOTATION_PREFIX)) {
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

/// The record of the first container of a pod whose namespaces are pinned. `None` if the pod has no
/// microVM.
fn first_of(root: &Path, pod: &str) -> Result<Option<Record>> {
    for (dir, record) in records(root)? {
        let is_first = record.pod.is_none() && is_first_of_pod(&record.annotations);
        let of_pod = record.annotations.get(POD_ID).is_some_and(|id| id == pod);
        if is_first && of_pod && record.sandbox.is_alive() && record.status != Status::Stopped {
            versions::check(&dir)?;
            return Ok(Some(record));
        }
    }
    Ok(None)
}

/// The record of the container whose pid on the host is `pid`.
fn record_of(root: &Path, pid: i32) -> Result<Record> {
    // A container that is being made or removed has no namespaces to share.
    for (dir, record) in records(root)? {
        if record.pid == pid && record.sandbox.is_alive() {
            return match record.status {
                Status::Creating | Status::Stopped => Err(Error::new(format!(
                    "linux.namespaces: the namespaces of container {} cannot be shared: it is {}",
                    record.id, record.status
                ))),
                Status::Created | Status::Running | Status::Paused => {
                    versions::check(&dir)?;
                    Ok(record)
                }
            };
        }
    }
    Err(Error::new(format!(
        "linux.namespaces: process {pid} is no container's in {}: the containers of a pod share a \
         microVM, so all of them have to run under isopod",
        root.display()
    )))
}

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

use oci_spec::runtime::LinuxNamespaceType;
use serde::{Deserialize, Serialize};

use crate::{
    bundle::{Joined, NetworkNamespace, VmSize, beyond_vm, check_fits},
    container_id::ContainerId,
    engine::{Pod, Record},
    error::{Error, Result},
    state::{StateDir, Status, ids, versions},
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
    /// if no namespaces are to be shared.
    ///
    /// # Errors
    ///
    /// If a process belongs to no container, or the containers live in several microVMs.
    pub(crate) fn find(root: &Path, joined: &[Joined]) -> Result<Option<Self>> {
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
    pub(crate) fn check(
        &self,
        network: &NetworkNamespace,
        spec: &oci_spec::runtime::Spec,
    ) -> Result<()> {
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
        let dir = StateDir::open(root, &id);
        let Ok(dir) = dir else { continue };
        let Ok(Some(record)) = Record::read(&dir) else { continue };
        if record.sandbox.pid == pid && record.sandbox.is_alive() {
            return match record.status {
                Status::Creating | Status::Stopped => Err(Error::new(format!(
                    "linux.namespaces: the namespaces of container {id} cannot be shared: it is {}",
                    record.status
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

//! `state.json`: the record of a container.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{Hooks, LinuxResources};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    bundle::{Bundle, VmSize, is_first_of_pod},
    cgroup::Cgroup,
    clock,
    container_id::ContainerId,
    error::{Error, Explain, Result},
    network::RedirectRecord,
    process_id::ProcessId,
    state::{
        Exit, RECORD_FILE, StateDir, Status, ids,
        versions::{CONTROL_VERSION, STATE_VERSION, Versions},
    },
    timeline::Timeline,
};

/// The readable part of a record that cannot be read as a whole, such as the record of another
/// version of isopod.
#[derive(Debug, Default)]
pub(crate) struct Remains {
    /// The sandbox process.
    pub sandbox: Option<ProcessId>,
    /// The VMM.
    pub vmm: Option<ProcessId>,
    /// The container's cgroup on the host.
    pub cgroup: Option<Cgroup>,
    /// The container's redirects in a network namespace that outlives it.
    pub network: Option<RedirectRecord>,
    /// True if the container lives in the microVM of its pod's first container.
    pub member: bool,
}

impl Remains {
    /// Reads the known fields of the record in `dir`, whatever its version.
    pub(crate) fn read(dir: &StateDir) -> Self {
        dir.read(RECORD_FILE).ok().flatten().map(|json| Self::of(&json)).unwrap_or_default()
    }

    fn of(json: &[u8]) -> Self {
        fn field<T: serde::de::DeserializeOwned>(record: &mut Value, name: &str) -> Option<T> {
            serde_json::from_value(record.get_mut(name)?.take()).ok()
        }
        let mut record: Value = serde_json::from_slice(json).unwrap_or_default();
        Self {
            sandbox: field(&mut record, "sandbox"),
            vmm: field(&mut record, "vmm"),
            cgroup: field(&mut record, "cgroup"),
            network: field(&mut record, "network"),
            member: field::<Value>(&mut record, "pod").is_some_and(|pod| !pod.is_null()),
        }
    }
}

/// The microVM that a container of a pod lives in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pod {
    /// The container that the microVM was made for.
    pub sandbox: ContainerId,
    /// State directory of that container.
    pub dir: PathBuf,
    /// The sandbox process of that container, which owns the VMM and the share.
    pub process: ProcessId,
    /// True if that container is a holder, which ends and is removed without its engine.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub holder: bool,
}

/// All that is known of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// [`STATE_VERSION`](crate::state::versions::STATE_VERSION) of the isopod that created the
    /// container.
    pub version: u32,
    /// [`CONTROL_VERSION`](crate::state::versions::CONTROL_VERSION) of the same isopod.
    pub control_version: u32,
    /// Id of the container.
    pub id: ContainerId,
    /// `ociVersion` of config.json.
    pub oci_version: String,
    /// Directory of the bundle.
    pub bundle: PathBuf,
    /// Directory of the root file system on the host.
    pub rootfs: PathBuf,
    /// The sandbox process, or the shim that owns the container.
    pub sandbox: ProcessId,
    /// The pid that callers know while the container has not stopped: that of the sandbox process,
    /// or of a thread of the shim.
    pub pid: i32,
    /// The VMM, once it runs.
    pub vmm: Option<ProcessId>,
    /// Size of the microVM.
    pub vm: VmSize,
    /// The pod's microVM, if the container has none of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Pod>,
    /// True for the holder of a pod's namespaces. It removes itself at its end.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub holder: bool,
    /// The limits that hold now, without rules for devices. Processors are the host's.
    pub resources: LinuxResources,
    /// The status as last written by the sandbox process.
    pub status: Status,
    /// Time of the creation, RFC 3339.
    pub created: String,
    /// Uid of the user who created the container.
    pub owner_uid: u32,
    /// `annotations` of config.json.
    pub annotations: BTreeMap<String, String>,
    /// The container's cgroup on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<Cgroup>,
    /// The hooks of config.json.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hooks: Option<Hooks>,
    /// The exit, if it is known.
    pub exit: Option<Exit>,
    /// Reason for an end without an exit status.
    pub error: Option<String>,
    /// True if the microVM was gone before the process had ended.
    pub lost: bool,
    /// The container's redirects in a network namespace that outlives it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<RedirectRecord>,
    /// Times of the steps that were reached when the record was written.
    #[serde(default)]
    pub timeline: Timeline,
}

/// The object that `state` and `list` print, with its members in runc's order.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct OciState<'a> {
    oci_version: &'a str,
    id: &'a ContainerId,
    pid: i32,
    status: Status,
    bundle: &'a Path,
    rootfs: &'a Path,
    created: &'a str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
    owner: String,
}

/// The containers below `root` whose records can be read, with their state directories. A container
/// that is being made or removed has none.
///
/// # Errors
///
/// If the root cannot be listed.
pub(crate) fn records(root: &Path) -> Result<impl Iterator<Item = (StateDir, Record)>> {
    Ok(ids(root)?.into_iter().filter_map(move |id| {
        let dir = StateDir::open(root, &id).ok()?;
        let record = Record::read(&dir).ok()??;
        Some((dir, record))
    }))
}

impl Record {
    /// The record of a container at its beginning, which has a microVM of its own and no cgroup.
    /// `pid` is the one that callers get to know, of `sandbox` or one of its threads.
    pub(crate) fn new(id: &ContainerId, bundle: &Bundle, sandbox: ProcessId, pid: i32) -> Self {
        let annotations = bundle.spec.annotations().iter().flatten();
        Self {
            version: STATE_VERSION,
            control_version: CONTROL_VERSION,
            id: id.clone(),
            oci_version: bundle.spec.version().clone(),
            bundle: bundle.dir.clone(),
            rootfs: bundle.rootfs.clone(),
            sandbox,
            pid,
            vmm: None,
            vm: bundle.vm,
            pod: None,
            holder: false,
            resources: resources(bundle),
            status: Status::Creating,
            created: clock::timestamp(),
            owner_uid: rustix::process::getuid().as_raw(),
            annotations: annotations.map(|(key, value)| (key.clone(), value.clone())).collect(),
            cgroup: None,
            hooks: bundle.spec.hooks().clone(),
            exit: None,
            error: None,
            lost: false,
            network: None,
            timeline: Timeline::default(),
        }
    }

    /// Reads the record in `dir`; `None` while there is no record.
    ///
    /// # Errors
    ///
    /// If the record cannot be read, is not valid, or was written by another version of isopod.
    pub(crate) fn read(dir: &StateDir) -> Result<Option<Self>> {
        let Some(json) = dir.read(RECORD_FILE)? else { return Ok(None) };
        let what = || dir.path().join(RECORD_FILE).display().to_string();
        // Checked first: the record of another version may have another form.
        let versions: Versions = serde_json::from_slice(&json).explain(what)?;
        versions.check_state(&dir.container_name())?;
        serde_json::from_slice(&json).map(Some).explain(what)
    }

    /// Writes the record. A reader sees the old or the new record, whole.
    pub(crate) fn write(&self, dir: &StateDir) -> Result<()> {
        let json = serde_json::to_vec(self).explain(|| "cannot write the state".into())?;
        dir.write(RECORD_FILE, &json)
    }

    /// The status now. A container whose sandbox process is gone is stopped, whatever the record
    /// says.
    pub(crate) fn current_status(&self) -> Status {
        if self.sandbox.is_alive() { self.status } else { Status::Stopped }
    }

    /// The OCI state object as `state` prints it, with the fields that runc adds: rootfs, created,
    /// owner. Annotations of our own tell how a stopped container ended.
    pub(crate) fn to_oci(&self) -> OciState<'_> {
        let status = self.current_status();
        let mut annotations = self.annotations.clone();
        if let Some(exit) = self.exit.filter(|_| status == Status::Stopped) {
            annotations.insert("dev.isopod.exit_status".into(), exit.status.to_string());
            if exit.oom_killed {
                annotations.insert("dev.isopod.oom_killed".into(), "true".into());
            }
        }
        if let Some(error) = self.ending() {
            annotations.insert("dev.isopod.error".into(), error);
        }
        OciState {
            oci_version: &self.oci_version,
            id: &self.id,
            pid: self.current_pid(),
            status,
            bundle: &self.bundle,
            rootfs: &self.rootfs,
            created: &self.created,
            annotations,
            owner: self.owner(),
        }
    }

    /// The specification's state object and no more, for hooks. `status` is known where hooks run.
    pub(crate) fn state_at(&self, status: Status) -> Value {
        let pid = if status == Status::Stopped { 0 } else { self.pid };
        json!({
            "ociVersion": self.oci_version,
            "id": self.id,
            "status": status,
            "pid": pid,
            "bundle": self.bundle,
            "annotations": self.annotations,
        })
    }

    /// Like [`Self::write`]; a failure goes to the log.
    pub(crate) fn save(&self, dir: &StateDir) {
        if let Err(error) = self.write(dir) {
            log::error!("container {}: {error}", self.id);
        }
    }

    /// The error for a verb that the container's status does not permit.
    pub(crate) fn wrong_state(&self, verb: &str, exit: Option<Exit>) -> Error {
        let id = &self.id;
        match (exit, self.status) {
            (Some(_), _) => self.not_running(verb),
            (None, Status::Created) => {
                Error::new(format!("cannot {verb} container {id}: it is being started or changed"))
            }
            (None, status) => Error::new(format!("cannot {verb} container {id}: it is {status}")),
        }
    }

    /// The error for a verb about a container whose process has ended.
    pub(crate) fn not_running(&self, verb: &str) -> Error {
        Error::new(format!("cannot {verb} container {}: container not running", self.id))
    }

    /// Tells whether the container belongs to a shim, which may have others too. The pid that callers
    /// know is then that of one of its threads.
    pub(crate) fn is_of_a_shim(&self) -> bool {
        self.pid != self.sandbox.pid
    }

    /// Returns true if the container's limits are those of a whole microVM on the host.
    ///
    /// In a pod they are not. The first container is the engine's own, and the cgroups of the
    /// others hold no VMM. The cgroup that the engine makes for the pod bounds the pod's microVM.
    pub(crate) fn bounds_microvm(&self) -> bool {
        self.pod.is_none() && !is_first_of_pod(&self.annotations)
    }

    /// Sends SIGCONT to the processes that have to answer for the container, if a signal has stopped
    /// them.
    pub(crate) fn let_go_on(&self) {
        self.sandbox.let_go_on();
        if let Some(pod) = &self.pod {
            pod.process.let_go_on();
        }
    }

    /// The pid that callers know; 0 once the container has stopped.
    pub(crate) fn current_pid(&self) -> i32 {
        match self.current_status() {
            Status::Stopped => 0,
            _ => self.pid,
        }
    }

    /// Name of the user who created the container, or the uid if there is no name.
    pub(crate) fn owner(&self) -> String {
        let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        let uid = self.owner_uid.to_string();
        passwd
            .lines()
            .map(|line| line.split(':').collect::<Vec<_>>())
            .find(|fields| fields.get(2) == Some(&uid.as_str()))
            .and_then(|fields| fields.first().map(|name| (*name).to_owned()))
            .unwrap_or(uid)
    }

    /// Returns true if the container stopped because its microVM or its sandbox process is gone.
    pub(crate) fn is_lost(&self) -> bool {
        let unsaid = self.exit.is_none() && self.error.is_none();
        self.current_status() == Status::Stopped && (self.lost || unsaid)
    }

    /// Reason why a stopped container has no exit status, if it has none.
    fn ending(&self) -> Option<String> {
        if self.current_status() != Status::Stopped {
            return None;
        }
        match (&self.error, self.exit) {
            (Some(error), _) => Some(error.clone()),
            (None, None) => Some(
                "the sandbox process ended unexpectedly; the exit status of the container is \
                 unknown"
                    .into(),
            ),
            (None, Some(_)) => None,
        }
    }
}

/// The limits of config.json, without rules for devices: no update changes these.
fn resources(bundle: &Bundle) -> LinuxResources {
    let linux = bundle.spec.linux().as_ref();
    let resources = linux.and_then(|linux| linux.resources().clone());
    let mut resources = resources.unwrap_or_default();
    resources.set_devices(None);
    resources
}

#[cfg(test)]
mod tests;

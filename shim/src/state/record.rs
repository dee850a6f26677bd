//! `state.json`: what is known of a container.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{Hooks, LinuxResources};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Id, ProcessId};
use crate::{
    bundle::{VmSize, is_first_of_pod},
    cgroup::Cgroup,
    error::{Error, Result},
    network::Taken,
    sandbox::{control::CONTROL_VERSION, pod::Pod},
};

/// Version of what is in a state directory. Raised by any change that an older or newer isopod cannot
/// read, or would read wrongly. What [`Remains`] reads stays as it is in all versions.
pub const STATE_VERSION: u32 = 1;

/// Versions of what a running sandbox speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Protocols {
    /// Of the agent in its guest.
    pub agent: u32,
    /// Of its sandbox process, over the control socket.
    pub control: u32,
}

impl Protocols {
    /// Those of this program.
    pub const OWN: Self =
        Self { agent: isopod_protocol::PROTOCOL_VERSION, control: CONTROL_VERSION };
}

/// Versions of a container's state and of what its sandbox speaks. Missing ones are 0, which none is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(super) struct Versions {
    #[serde(default)]
    version: u32,
    protocols: Option<Protocols>,
}

impl Versions {
    /// Checks that the state can be read.
    ///
    /// # Errors
    ///
    /// If another version of isopod has written it.
    pub(super) fn check_state(self, id: &str) -> Result<()> {
        if self.version == STATE_VERSION {
            return Ok(());
        }
        Err(Error::new(format!(
            "container {id} was created by another isopod: its state has version {}, and this one \
             reads {STATE_VERSION}. Use that isopod for it, or end it by `isopod delete --force {id}`",
            self.version
        )))
    }

    /// Checks that the sandbox can be talked to.
    ///
    /// # Errors
    ///
    /// As [`Self::check_state`], or if it speaks another version of one of its protocols.
    pub(super) fn check(self, id: &str) -> Result<()> {
        self.check_state(id)?;
        match self.protocols {
            Some(Protocols::OWN) => Ok(()),
            other => {
                let Protocols { agent, control } =
                    other.unwrap_or(Protocols { agent: 0, control: 0 });
                let own = Protocols::OWN;
                Err(Error::new(format!(
                    "container {id} runs under another isopod, whose protocols have version {agent} \
                     (agent) and {control} (control), and this one speaks {} and {}. Use that isopod \
                     for it, or end it by `isopod kill {id} KILL` or `isopod delete --force {id}`",
                    own.agent, own.control
                )))
            }
        }
    }
}

/// What can be known of a container whose record cannot be read, as of one that another version of
/// isopod has created.
#[derive(Debug, Default)]
pub struct Remains {
    /// The sandbox process.
    pub sandbox: Option<ProcessId>,
    /// The VMM.
    pub vmm: Option<ProcessId>,
    /// Its cgroup on the host.
    pub cgroup: Option<Cgroup>,
    /// What it has taken of a network namespace that outlives it.
    pub network: Option<Taken>,
}

impl Remains {
    /// Takes what can be read of a record.
    pub(super) fn of(json: &[u8]) -> Self {
        fn field<T: serde::de::DeserializeOwned>(record: &mut Value, name: &str) -> Option<T> {
            serde_json::from_value(record.get_mut(name)?.take()).ok()
        }
        let mut record: Value = serde_json::from_slice(json).unwrap_or_default();
        Self {
            sandbox: field(&mut record, "sandbox"),
            vmm: field(&mut record, "vmm"),
            cgroup: field(&mut record, "cgroup"),
            network: field(&mut record, "network"),
        }
    }
}

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// The microVM boots and the container is built.
    Creating,
    /// Its process waits to be started.
    Created,
    /// Its process runs.
    Running,
    /// Its processes are stopped where they are, until they are resumed.
    Paused,
    /// Its process has ended, or the microVM has.
    Stopped,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// How a container's process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit status, 128 + n after signal n.
    pub status: u8,
    /// The kernel killed a process of it because it went over its memory limit.
    pub oom_killed: bool,
}

/// Everything known of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// [`STATE_VERSION`] of the isopod that created it.
    pub version: u32,
    /// What its sandbox speaks.
    pub protocols: Protocols,
    /// Its id.
    pub id: Id,
    /// `ociVersion` of its config.json.
    pub oci_version: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its root file system on the host.
    pub rootfs: PathBuf,
    /// The sandbox process.
    pub sandbox: ProcessId,
    /// The VMM, once it runs.
    pub vmm: Option<ProcessId>,
    /// Size of the microVM.
    pub vm: VmSize,
    /// Whose microVM it is, if that was not made for this container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Pod>,
    /// The limits that hold now, without rules for devices. Processors are the host's.
    pub resources: LinuxResources,
    /// As last written by the sandbox process.
    pub status: Status,
    /// When it was created, RFC 3339.
    pub created: String,
    /// Who created it.
    pub owner_uid: u32,
    /// `annotations` of its config.json.
    pub annotations: BTreeMap<String, String>,
    /// Its cgroup on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<Cgroup>,
    /// The hooks of its config.json.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hooks: Option<Hooks>,
    /// How it ended, if that is known.
    pub exit: Option<Exit>,
    /// Why it ended without an exit status.
    pub error: Option<String>,
    /// The microVM was gone before its process had ended.
    pub lost: bool,
    /// What it has taken of a network namespace that outlives it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<Taken>,
}

/// The object that `state` and `list` print, with its members in runc's order.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OciState<'a> {
    oci_version: &'a str,
    id: &'a Id,
    pid: i32,
    status: Status,
    bundle: &'a Path,
    rootfs: &'a Path,
    created: &'a str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
    owner: String,
}

impl Record {
    /// The status now: a container whose sandbox process is gone is stopped, whatever was written.
    pub fn current_status(&self) -> Status {
        if self.sandbox.is_alive() { self.status } else { Status::Stopped }
    }

    /// The state as `state` prints it: the OCI runtime specification's object, with what runc adds
    /// (rootfs, created, owner) and annotations of our own on how a stopped container ended.
    pub fn to_oci(&self) -> OciState<'_> {
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

    /// The specification's state object and no more, for hooks, which run at a known status.
    pub fn state_at(&self, status: Status) -> Value {
        let pid = if status == Status::Stopped { 0 } else { self.sandbox.pid };
        json!({
            "ociVersion": self.oci_version,
            "id": self.id,
            "status": status,
            "pid": pid,
            "bundle": self.bundle,
            "annotations": self.annotations,
        })
    }

    /// The container's limits are those of a whole microVM on the host. Not so in a pod: its first
    /// container is the engine's own, and the cgroups of the others hold no VMM. What bounds the microVM
    /// of a pod is the cgroup that the engine makes for the pod.
    pub(crate) fn bounds_microvm(&self) -> bool {
        self.pod.is_none() && !is_first_of_pod(&self.annotations)
    }

    /// The pid that callers know, 0 once stopped.
    pub fn current_pid(&self) -> i32 {
        match self.current_status() {
            Status::Stopped => 0,
            _ => self.sandbox.pid,
        }
    }

    /// The name of the user who created it, or the uid if it has none.
    pub fn owner(&self) -> String {
        let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        let uid = self.owner_uid.to_string();
        passwd
            .lines()
            .map(|line| line.split(':').collect::<Vec<_>>())
            .find(|fields| fields.get(2) == Some(&uid.as_str()))
            .and_then(|fields| fields.first().map(|name| (*name).to_owned()))
            .unwrap_or(uid)
    }

    /// It has stopped because its microVM or its sandbox process is gone.
    pub fn is_lost(&self) -> bool {
        let unsaid = self.exit.is_none() && self.error.is_none();
        self.current_status() == Status::Stopped && (self.lost || unsaid)
    }

    /// Why a container that has stopped has no exit status, if it has none.
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

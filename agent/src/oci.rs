//! The part of the OCI runtime specification that reaches a guest, as types for its JSON.
//!
//! The host's crate covers the whole specification. It brings a regular expression engine, which
//! would be a third of the agent. More importantly, these types refuse unknown fields by name, so
//! no request of a config.json is dropped in silence.
//!
//! Fields that are accepted and never read belong to the host side of the sandbox.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{self, Error};

/// Reads JSON. The error omits serde's list of all valid names.
pub(crate) fn parse_json<T: DeserializeOwned>(name: &str, json: &[u8]) -> error::Result<T> {
    serde_json::from_slice(json).map_err(|e| {
        let text = e.to_string();
        let what = text.split(", expected one of").next().unwrap_or_default();
        Error::invalid(name, what)
    })
}

/// Defines an object of the specification, in which optional fields are absent by default.
macro_rules! object {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Default, Serialize, Deserialize)]
        #[serde(rename_all = "camelCase", default, deny_unknown_fields)]
        pub(crate) struct $name {
            $(
                $(#[$field_meta])*
                #[serde(deserialize_with = "null_is_default")]
                pub(crate) $field: $type,
            )*
        }
    };
}

/// Reads `null` as the default: callers written in Go write `null` for an empty list.
fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// A value for the host side, or one that is refused whatever it contains.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct Opaque(IgnoredAny);

impl Serialize for Opaque {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_unit()
    }
}

object! {
    /// config.json.
    Spec {
        oci_version: String,
        root: Option<Root>,
        mounts: Vec<Mount>,
        process: Option<ProcessSpec>,
        hostname: Option<String>,
        domainname: Option<String>,
        hooks: Option<Hooks>,
        annotations: Option<Opaque>,
        linux: Option<Linux>,
        /// Read by the host.
        vm: Option<Opaque>,
        windows: Option<Opaque>,
        solaris: Option<Opaque>,
        zos: Option<Opaque>,
    }
}

object! { Root { path: PathBuf, readonly: bool, } }

object! {
    Mount {
        destination: PathBuf,
        #[serde(rename = "type")]
        kind: Option<String>,
        source: Option<PathBuf>,
        options: Vec<String>,
        uid_mappings: Vec<Opaque>,
        gid_mappings: Vec<Opaque>,
    }
}

object! {
    /// Hooks. The host reads those that run on the host.
    Hooks {
        prestart: Option<Opaque>,
        create_runtime: Option<Opaque>,
        create_container: Vec<Hook>,
        start_container: Vec<Hook>,
        poststart: Option<Opaque>,
        poststop: Option<Opaque>,
    }
}

object! {
    Hook {
        path: PathBuf,
        args: Vec<String>,
        /// Environment; that of the container's process if absent.
        #[serde(skip_serializing_if = "Option::is_none")]
        env: Option<Vec<String>>,
        /// Timeout in seconds.
        timeout: Option<u64>,
    }
}

object! {
    /// State object that hooks read on their standard input.
    HookState {
        oci_version: String,
        id: String,
        status: String,
        pid: i32,
        bundle: PathBuf,
        annotations: BTreeMap<String, String>,
    }
}

object! {
    ProcessSpec {
        terminal: bool,
        console_size: Option<ConsoleSize>,
        user: User,
        args: Vec<String>,
        env: Vec<String>,
        cwd: PathBuf,
        #[serde(skip_serializing_if = "Option::is_none")]
        capabilities: Option<Capabilities>,
        #[serde(skip_serializing_if = "Option::is_none")]
        rlimits: Option<Vec<PosixRlimit>>,
        #[serde(skip_serializing_if = "Option::is_none")]
        no_new_privileges: Option<bool>,
        apparmor_profile: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        oom_score_adj: Option<i32>,
        selinux_label: String,
        command_line: Option<Opaque>,
        io_priority: Option<IoPriority>,
        scheduler: Option<Scheduler>,
        #[serde(rename = "execCPUAffinity")]
        exec_cpu_affinity: ExecCpuAffinity,
    }
}

object! { IoPriority { class: String, priority: i64, } }

object! {
    Scheduler {
        policy: String,
        nice: i32,
        priority: i32,
        flags: Vec<String>,
        runtime: u64,
        deadline: u64,
        period: u64,
    }
}

object! {
    ExecCpuAffinity {
        /// Affinity before the process is in its cgroup, where the agent clones it directly.
        initial: String,
        #[serde(rename = "final")]
        last: String,
    }
}

object! { Personality { domain: String, flags: Vec<String>, } }

object! { ConsoleSize { height: u64, width: u64, } }

object! {
    User {
        uid: u32,
        gid: u32,
        #[serde(skip_serializing_if = "Option::is_none")]
        umask: Option<u32>,
        additional_gids: Vec<u32>,
        /// User name on systems other than Linux.
        username: String,
    }
}

object! {
    Capabilities {
        bounding: Vec<String>,
        effective: Vec<String>,
        inheritable: Vec<String>,
        permitted: Vec<String>,
        ambient: Vec<String>,
    }
}

object! {
    PosixRlimit {
        #[serde(rename = "type")]
        kind: String,
        hard: u64,
        soft: u64,
    }
}

object! {
    Linux {
        uid_mappings: Vec<IdMapping>,
        gid_mappings: Vec<IdMapping>,
        sysctl: BTreeMap<String, String>,
        resources: Resources,
        /// Path of the host's cgroup. In the guest each container has a cgroup of its own.
        cgroups_path: Option<Opaque>,
        namespaces: Vec<Namespace>,
        devices: Vec<Device>,
        rootfs_propagation: String,
        masked_paths: Vec<PathBuf>,
        readonly_paths: Vec<PathBuf>,
        mount_label: String,
        intel_rdt: Option<Opaque>,
        time_offsets: BTreeMap<String, TimeOffset>,
        seccomp: Option<Opaque>,
        personality: Option<Personality>,
        memory_policy: Option<Opaque>,
        net_devices: BTreeMap<String, Opaque>,
    }
}

object! {
    IdMapping {
        #[serde(rename = "hostID")]
        host_id: u32,
        #[serde(rename = "containerID")]
        container_id: u32,
        size: u32,
    }
}

/// Types of namespaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum NamespaceKind {
    Mount,
    Cgroup,
    Uts,
    Ipc,
    User,
    Pid,
    Network,
    Time,
}

impl NamespaceKind {
    /// The type's name in config.json.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Mount => "mount",
            Self::Cgroup => "cgroup",
            Self::Uts => "uts",
            Self::Ipc => "ipc",
            Self::User => "user",
            Self::Pid => "pid",
            Self::Network => "network",
            Self::Time => "time",
        }
    }
}

/// An entry of `linux.namespaces`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Namespace {
    #[serde(rename = "type")]
    pub(crate) kind: NamespaceKind,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(crate) path: PathBuf,
}

object! { TimeOffset { secs: i64, nanosecs: u32, } }

/// Types of devices, as in mknod(1), and `a` for all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum DeviceKind {
    #[serde(rename = "a")]
    All,
    #[serde(rename = "b")]
    Block,
    #[serde(rename = "c")]
    Char,
    #[serde(rename = "u")]
    Unbuffered,
    #[serde(rename = "p")]
    Fifo,
}

/// An entry of `linux.devices`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Device {
    pub(crate) path: PathBuf,
    #[serde(rename = "type")]
    pub(crate) kind: DeviceKind,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(crate) major: i64,
    #[serde(default, deserialize_with = "null_is_default")]
    pub(crate) minor: i64,
    pub(crate) file_mode: Option<u32>,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
}

object! {
    Resources {
        devices: Vec<DeviceRule>,
        memory: Memory,
        cpu: Cpu,
        pids: Option<Pids>,
        #[serde(rename = "blockIO")]
        block_io: BlockIo,
        hugepage_limits: Vec<HugepageLimit>,
        network: NetworkResources,
        rdma: BTreeMap<String, Opaque>,
        unified: BTreeMap<String, String>,
    }
}

object! {
    DeviceRule {
        allow: bool,
        #[serde(rename = "type")]
        kind: Option<DeviceKind>,
        major: Option<i64>,
        minor: Option<i64>,
        access: Option<String>,
    }
}

object! {
    Memory {
        limit: Option<i64>,
        reservation: Option<i64>,
        swap: Option<i64>,
        kernel: Option<i64>,
        #[serde(rename = "kernelTCP")]
        kernel_tcp: Option<i64>,
        /// Without effect: the guest has no swap.
        swappiness: Option<u64>,
        #[serde(rename = "disableOOMKiller")]
        disable_oom_killer: bool,
        /// Without effect: cgroup v2 is always hierarchical.
        use_hierarchy: Option<bool>,
        /// Used by updates only: nothing is in use yet when a container is created.
        check_before_update: Option<bool>,
    }
}

object! {
    Cpu {
        shares: Option<u64>,
        quota: Option<i64>,
        burst: Option<u64>,
        period: Option<u64>,
        realtime_runtime: Option<i64>,
        realtime_period: Option<u64>,
        cpus: String,
        mems: String,
        idle: Option<i64>,
    }
}

object! { Pids { limit: i64, } }

object! {
    BlockIo {
        weight: Option<u16>,
        leaf_weight: Option<u16>,
        weight_device: Vec<WeightDevice>,
        throttle_read_bps_device: Vec<ThrottleDevice>,
        throttle_write_bps_device: Vec<ThrottleDevice>,
        #[serde(rename = "throttleReadIOPSDevice")]
        throttle_read_iops_device: Vec<ThrottleDevice>,
        #[serde(rename = "throttleWriteIOPSDevice")]
        throttle_write_iops_device: Vec<ThrottleDevice>,
    }
}

object! {
    WeightDevice {
        major: i64,
        minor: i64,
        weight: Option<u16>,
        leaf_weight: Option<u16>,
    }
}

object! { ThrottleDevice { major: i64, minor: i64, rate: u64, } }

object! { HugepageLimit { page_size: String, limit: i64, } }

object! {
    NetworkResources {
        #[serde(rename = "classID")]
        class_id: Option<u32>,
        priorities: Vec<HashMap<String, Opaque>>,
    }
}

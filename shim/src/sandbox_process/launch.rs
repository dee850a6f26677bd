//! The launch document: everything that a sandbox process works from.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{
    bundle::Bundle, cgroup::CgroupPlan, container_id::ContainerId, microvm::boot::BootSettings,
    preserved::Preserved, sandbox_process::pod_lookup::Membership, terminal::Terminal,
};

/// The launch document of a sandbox process. All paths are absolute.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Launch {
    /// Id of the container.
    pub id: ContainerId,
    /// The container's bundle, with the size of the container's microVM.
    pub bundle: Bundle,
    /// The pod whose microVM the container lives in, if it has no microVM of its own.
    pub pod: Option<Membership>,
    /// True for the holder of a pod, whose bundle is [`Bundle::holder`].
    pub holder: bool,
    /// Number of spare devices for a network namespace without interfaces.
    pub spare_nics: u8,
    /// Number of places for disks of further containers.
    pub spare_disks: u8,
    /// Settings for making the microVM.
    pub boot: BootSettings,
    /// The cgroup of the sandbox, on a host with cgroups v2.
    pub cgroup: Option<CgroupPlan>,
    /// Host side of the container's terminal, if it has one.
    pub terminal: Option<Terminal>,
    /// True if the command that creates the container does not stay until its end.
    pub detached: bool,
    /// Descriptors of the caller that the container's process gets, from descriptor 3 on.
    pub preserved: Vec<Preserved>,
    /// Parents that were made for the state directory, and are removed with it.
    pub made: Vec<PathBuf>,
    /// Start of the command: [`crate::clock::monotonic_us`].
    pub command_us: u64,
}

//! The host's cgroup of a sandbox. There `docker stats`, `podman stats` and the host's
//! administrator find what a microVM uses.
//!
//! The sandbox process enters the cgroup before it starts the VMM. So all memory and time of the
//! microVM are charged to it. Limits on processor time hold in it too, with an allowance: see
//! [`cpu`]. All other limits of the container hold in the guest, where they count the container
//! alone. The size of the microVM bounds the memory from outside. All controllers are enabled, so
//! the host's administrator can set limits in the cgroup or above.
//!
//! Only cgroups v2 are used. On hosts with v1 hierarchies a sandbox stays in its caller's cgroups.

mod cpu;
mod fs;
mod plan;
mod systemd;

pub(crate) use self::cpu::CpuLimits;
pub use self::{fs::Cgroup, plan::CgroupPlan, systemd::Unit};

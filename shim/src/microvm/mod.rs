//! The microVM of a sandbox, from its host side: VMM process, boot, client of the agent, share, and
//! mount view.

pub(crate) mod agent;
pub(crate) mod boot;
pub(crate) mod disks;
pub(crate) mod dns_proxy;
pub(crate) mod drop_caches;
pub(crate) mod guest_clock;
mod hello;
pub(crate) mod host_sockets;
pub(crate) mod mount_view;
pub(crate) mod placement;
pub(crate) mod port_forward;
pub(crate) mod share;
pub(crate) mod vmm;
pub(crate) mod volumes;
pub(crate) mod vsock;

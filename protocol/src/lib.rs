//! The contract between the host side of a sandbox and the agent inside its guest.
//!
//! Both sides are built from one tree and shipped together, so the contract has one version number
//! and no negotiation: [`Hello`] carries it, and the host refuses a guest that speaks another.

pub mod capability;
pub mod mount_option;
pub mod sysctl;

/// Version of everything in this crate. Raised by any change that one side alone cannot survive.
pub const PROTOCOL_VERSION: u32 = 3;

/// vsock port in the guest where the agent serves [`agent_ttrpc::Agent`].
pub const AGENT_PORT: u32 = 1024;

/// vsock port in the guest where the host opens stdio streams.
pub const STREAM_PORT: u32 = 1025;

/// Most descriptors that a process can have beyond its standard streams.
pub const MAX_FURTHER_STREAMS: usize = 64;

/// vsock port on the host to which the agent sends one [`Hello`] line when it serves both ports.
pub const READY_PORT: u32 = 1024;

/// vsock port on the host to which the agent passes what a container asks the name server of its
/// engine. A connection is one question: [`RESOLVE_DATAGRAM`], then question and answer, each with
/// its length before it as two bytes, big endian; or [`RESOLVE_STREAM`], then a stream.
pub const RESOLVER_PORT: u32 = 1025;

/// A question that came in a datagram.
pub const RESOLVE_DATAGRAM: u8 = b'd';

/// Questions that come in a stream.
pub const RESOLVE_STREAM: u8 = b's';

/// Longest datagram to or from a name server, in bytes. Those that are longer are cut off, and
/// whoever asked cannot read them and asks by a stream.
pub const MAX_DATAGRAM: usize = 16 * 1024;

/// Tag of the virtio-fs device that holds the sandbox's shared directory.
pub const SHARED_TAG: &str = "isopod";

/// Where the guest mounts the shared directory.
pub const SHARED_DIR: &str = "/run/isopod/shared";

/// Where the guest has the shared memory of the containers of a pod.
pub const SHM_DIR: &str = "/run/isopod/shm";

/// Begins the `path` of a namespace in the specification that the agent gets, when that is the one of
/// another container of the sandbox: its id follows.
pub const JOIN_PREFIX: &str = "container:";

/// The first and only message on [`READY_PORT`]: one line of JSON, then the agent closes.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Hello {
    /// The agent's [`PROTOCOL_VERSION`].
    pub protocol: u32,
    /// The guest's `uname -r`.
    pub kernel: String,
    /// Guest time (`CLOCK_BOOTTIME`) in microseconds when the agent's `main` began.
    pub init_us: u64,
    /// Guest time (`CLOCK_BOOTTIME`) in microseconds when this line was written.
    pub ready_us: u64,
    /// `MemTotal` less `MemAvailable` of the guest, in KiB, when this line was written.
    pub memory_used_kib: u64,
}

// Written by the code generator at build time.
#[allow(missing_docs, unreachable_pub, unused_mut, clippy::all, clippy::restriction)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/modules.rs"));
}

pub use generated::{agent, agent_ttrpc};

//! The contract between the host side of a sandbox and the agent inside its guest.
//!
//! Both sides are built from one tree and shipped together. So the contract has one version number
//! and no negotiation: [`Hello`] carries the number, and the host refuses a guest with another.

pub mod capability;
pub mod mount_option;
pub mod sysctl;
pub mod text;

/// Version of everything in this crate. Raised by any change that one side alone cannot handle.
pub const PROTOCOL_VERSION: u32 = 7;

/// vsock port in the guest on which the agent serves [`agent_ttrpc::Agent`].
pub const AGENT_PORT: u32 = 1024;

/// vsock port in the guest to which the host opens stdio streams.
pub const STREAM_PORT: u32 = 1025;

/// Most descriptors of a process beyond its standard streams.
pub const MAX_FURTHER_STREAMS: usize = 64;

/// vsock port on the host for the agent's [`Hello`] line, sent once the agent serves both ports.
pub const READY_PORT: u32 = 1024;

/// vsock port on the host for the questions of containers to their engine's name server.
///
/// A connection is one question. [`RESOLVE_DATAGRAM`] comes before question and answer, each after
/// its length in two bytes, big endian. [`RESOLVE_STREAM`] comes before a stream.
pub const RESOLVER_PORT: u32 = 1025;

/// vsock port on the host for connections of containers to unix sockets of the host. A connection
/// begins with the socket's token, [`HOST_SOCKET_TOKEN_LEN`] bytes.
pub const HOST_SOCKET_PORT: u32 = 1026;

/// Bytes of a token.
pub const HOST_SOCKET_TOKEN_LEN: usize = 16;

/// Kind of a question that came in a datagram.
pub const RESOLVE_DATAGRAM: u8 = b'd';

/// Kind of a connection whose questions come in a stream.
pub const RESOLVE_STREAM: u8 = b's';

/// Longest datagram to or from a name server, in bytes. Longer ones are cut off; a client then
/// repeats its question by a stream.
pub const MAX_DATAGRAM: usize = 16 * 1024;

/// Tag of the virtio-fs device with the sandbox's shared directory.
pub const SHARED_TAG: &str = "isopod";

/// Mount point of the shared directory in the guest.
pub const SHARED_DIR: &str = "/run/isopod/shared";

/// Directory of the shared memory of a pod's containers in the guest.
pub const SHM_DIR: &str = "/run/isopod/shm";

/// Directory in the guest of the sockets that stand for sockets of the host, each below its
/// container's id, by the position of its mount.
pub const HOST_SOCKETS_DIR: &str = "/run/isopod/host-sockets";

/// Prefix of the `path` of a namespace that belongs to another container of the sandbox, in the
/// agent's specification. The other container's id follows.
pub const JOIN_PREFIX: &str = "container:";

/// The first and only message on [`READY_PORT`]: one line of JSON. The agent closes after it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Hello {
    /// The agent's [`PROTOCOL_VERSION`].
    pub protocol: u32,
    /// The guest's `uname -r`.
    pub kernel: String,
    /// Guest time (`CLOCK_BOOTTIME`) in microseconds at the start of the agent's `main`.
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

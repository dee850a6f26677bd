//! What the socket device knows of its streams, apart from the host sockets themselves: whoever goes
//! on from it has to connect them anew, or reset the streams.

use serde::{Deserialize, Serialize};

/// All streams.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MuxerState {
    /// The streams, in the order in which they were opened.
    pub connections: Vec<ConnectionState>,
    /// Host and guest port of streams whose reset the guest has still to be told.
    pub resets: Vec<(u32, u32)>,
    /// Where the search for a free host port goes on.
    pub next_host_port: u32,
}

/// How far a stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StreamState {
    /// A host process has connected, and its `CONNECT` line is awaited.
    Handshake,
    /// The guest was asked, or is to be.
    Requested,
    /// Data flows.
    Open,
    /// Only what the guest sent before is left to be handed on.
    Draining,
}

/// One stream. Counters are in bytes and wrap (virtio 1.2, 5.10.6.3).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionState {
    /// How far it is.
    pub state: StreamState,
    /// Port on the host's side.
    pub host_port: u32,
    /// Port on the guest's side.
    pub guest_port: u32,
    /// The guest opened it.
    pub opened_by_guest: bool,
    /// The guest has still to be asked for it.
    pub announce_request: bool,
    /// The guest has still to be told that it is open.
    pub announce_response: bool,
    /// The guest has still to be told of its credit.
    pub announce_credit: bool,
    /// From the guest, and not yet taken by the host socket.
    pub backlog: Vec<u8>,
    /// Received from the guest.
    pub received: u32,
    /// Handed on to the host socket.
    pub forwarded: u32,
    /// What the guest knows of that.
    pub announced: u32,
    /// The guest sends no more.
    pub guest_send_closed: bool,
    /// The host socket was told so.
    pub host_write_shut: bool,
    /// Sent to the guest.
    pub sent: u32,
    /// What the guest can buffer.
    pub peer_buf_alloc: u32,
    /// What the guest has handed on.
    pub peer_forwarded: u32,
    /// The guest takes no more.
    pub guest_receive_closed: bool,
    /// The host's process sends no more.
    pub host_eof: bool,
    /// The host's process takes no more.
    pub host_receive_closed: bool,
    /// Shutdown flags that the guest has been told.
    pub told: u32,
}

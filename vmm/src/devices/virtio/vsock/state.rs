//! State of the socket device's streams, without the host sockets. Streams from a restored state
//! must be connected again, or reset.

use serde::{Deserialize, Serialize};

/// State of all streams.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MuxerState {
    /// The streams, in the order in which they were opened.
    pub connections: Vec<ConnectionState>,
    /// Host and guest port of streams whose reset the guest must still get.
    pub resets: Vec<(u32, u32)>,
    /// Next host port to try for a new stream.
    pub next_host_port: u32,
}

/// Phase of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StreamState {
    /// A host process has connected, and has not sent its whole `CONNECT` line.
    Handshake,
    /// The guest has got a request, or is to get one.
    Requested,
    /// The stream carries data.
    Open,
    /// Only earlier data of the guest is left to write to the host.
    Draining,
}

/// State of one stream. Counters are in bytes and wrap (virtio 1.2, 5.10.6.3).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionState {
    /// Phase of the stream.
    pub state: StreamState,
    /// Port of the host.
    pub host_port: u32,
    /// Port of the guest.
    pub guest_port: u32,
    /// True if the guest opened the stream.
    pub opened_by_guest: bool,
    /// True if the guest must still get the request.
    pub announce_request: bool,
    /// True if the guest must still get the response.
    pub announce_response: bool,
    /// True if the guest must still get its credit.
    pub announce_credit: bool,
    /// Data of the guest that the host socket has not taken yet.
    pub backlog: Vec<u8>,
    /// Bytes received from the guest.
    pub received: u32,
    /// Bytes written to the host socket.
    pub forwarded: u32,
    /// Value of `forwarded` that the guest knows.
    pub announced: u32,
    /// True if the guest sends no more.
    pub guest_send_closed: bool,
    /// True if the host socket is shut down for writing.
    pub host_write_shut: bool,
    /// Bytes sent to the guest.
    pub sent: u32,
    /// Buffer size of the guest.
    pub peer_buf_alloc: u32,
    /// Bytes that the guest has handed on.
    pub peer_forwarded: u32,
    /// True if the guest receives no more.
    pub guest_receive_closed: bool,
    /// True if the host's process sends no more.
    pub host_eof: bool,
    /// True if the host's process reads no more.
    pub host_receive_closed: bool,
    /// Shutdown flags that the guest has got.
    pub told: u32,
}

//! The fields of a vsock packet (virtio 1.2, 5.10.6) that decide what happens with it.

use virtio_vsock::packet::VsockPacket;

/// `VIRTIO_VSOCK_TYPE_STREAM`
pub(super) const TYPE_STREAM: u16 = 1;

/// Most data in one packet; Linux sends no more than 64 KiB.
pub(super) const MAX_DATA_LEN: u32 = 64 * 1024;

/// Flags of [`Op::Shutdown`].
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// See [`SHUTDOWN_RECEIVE`].
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// What a packet is for (`VIRTIO_VSOCK_OP_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Op {
    pub(super) fn from_raw(op: u16) -> Option<Self> {
        Some(match op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// The two ends of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

impl Ports {
    /// Of a packet that the guest sent.
    pub(super) fn of_sent(packet: &VsockPacket<'_, ()>) -> Self {
        Self { host: packet.dst_port(), guest: packet.src_port() }
    }
}

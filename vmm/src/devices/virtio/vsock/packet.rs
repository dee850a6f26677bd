//! Vsock packets (virtio 1.2, 5.10.6): a header, and data in any number of buffers behind it. Linux
//! uses several buffers for more than 32 KiB.

use crate::devices::virtio::chain::Buffers;

/// Length of the header in bytes.
pub(crate) const HEADER_LEN: usize = 44;

/// The context id of the host (`VMADDR_CID_HOST`).
pub(super) const HOST_CID: u64 = 2;

/// `VIRTIO_VSOCK_TYPE_STREAM`
pub(super) const TYPE_STREAM: u16 = 1;

/// Most data of one packet in bytes. Linux sends no more than 64 KiB.
pub(super) const MAX_DATA_LEN: u32 = 64 * 1024;

/// Flags of [`Op::Shutdown`].
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// See [`SHUTDOWN_RECEIVE`].
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// Operation of a packet (`VIRTIO_VSOCK_OP_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Op {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Op {
    pub(crate) fn from_raw(op: u16) -> Option<Self> {
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

/// `struct virtio_vsock_hdr`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) src_cid: u64,
    pub(crate) dst_cid: u64,
    pub(crate) src_port: u32,
    pub(crate) dst_port: u32,
    pub(crate) len: u32,
    pub(crate) kind: u16,
    pub(crate) op: u16,
    pub(crate) flags: u32,
    pub(crate) buf_alloc: u32,
    pub(crate) fwd_cnt: u32,
}

impl Header {
    pub(crate) fn from_bytes(bytes: [u8; HEADER_LEN]) -> Self {
        let mut fields = Fields(&bytes);
        Self {
            src_cid: u64::from_le_bytes(fields.next()),
            dst_cid: u64::from_le_bytes(fields.next()),
            src_port: u32::from_le_bytes(fields.next()),
            dst_port: u32::from_le_bytes(fields.next()),
            len: u32::from_le_bytes(fields.next()),
            kind: u16::from_le_bytes(fields.next()),
            op: u16::from_le_bytes(fields.next()),
            flags: u32::from_le_bytes(fields.next()),
            buf_alloc: u32::from_le_bytes(fields.next()),
            fwd_cnt: u32::from_le_bytes(fields.next()),
        }
    }

    pub(crate) fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// Iterator over the fields of a header.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn next<const N: usize>(&mut self) -> [u8; N] {
        let mut field = [0; N];
        if let Some((front, rest)) = self.0.split_at_checked(N) {
            field.copy_from_slice(front);
            self.0 = rest;
        }
        field
    }
}

/// Decodes a packet that the guest has sent. `None` if `buffers` hold no packet.
pub(super) fn parse<'m>(buffers: &mut Buffers<'m>) -> Option<(Header, Buffers<'m>)> {
    // The header is copied once, so later changes of guest memory have no effect.
    let header = Header::from_bytes(buffers.take()?);
    let len = Some(header.len).filter(|len| *len <= MAX_DATA_LEN)?;
    let data = buffers.split_to(len as usize)?;
    Some((header, data))
}

/// The two ends of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

impl Ports {
    /// Returns the ports of a packet that the guest has sent.
    pub(super) fn of_sent(header: &Header) -> Self {
        Self { host: header.dst_port, guest: header.src_port }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_way_to_bytes_and_back() {
        let bytes = std::array::from_fn(|n| n as u8);
        let header = Header::from_bytes(bytes);
        assert_eq!((header.src_cid, header.kind), (0x0706_0504_0302_0100, 0x1d1c));
        assert_eq!(header.to_bytes(), bytes);
    }
}

//! Sizes of a packet and its header.

/// Length of the header of each packet (`struct virtio_net_hdr_v1`, 5.1.6).
pub(super) const HEADER_LEN: usize = 12;

/// More than any packet with its header: 64 KiB of payload, and 4 KiB for the headers of all
/// layers.
pub(super) const MAX_PACKET_LEN: usize = 68 << 10;

//! What a virtio device is besides its sockets, files and threads: plain data that can be written
//! down, and from which queues can be made again.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};

use super::mmio::TransportState;
use super::net::NetState;
use super::vsock::MuxerState;

/// A queue (virtio 1.2, 2.7). Addresses are guest physical; sizes and indices count chains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// The driver has set it up.
    pub ready: bool,
    /// Largest size that the device takes.
    pub max_size: u16,
    /// The size that the driver chose.
    pub size: u16,
    /// The descriptor table.
    pub desc_table: u64,
    /// The available ring.
    pub avail_ring: u64,
    /// The used ring.
    pub used_ring: u64,
    /// The next entry of the available ring to look at.
    pub next_avail: u16,
    /// The next entry of the used ring to write.
    pub next_used: u16,
    /// `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// It is left alone until a reset.
    pub dead: bool,
}

impl QueueState {
    /// The state of `queue`.
    pub fn of(queue: &Queue, dead: bool) -> Self {
        Self {
            ready: queue.ready(),
            max_size: queue.max_size(),
            size: queue.size(),
            desc_table: queue.desc_table(),
            avail_ring: queue.avail_ring(),
            used_ring: queue.used_ring(),
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
            event_idx: queue.event_idx_enabled(),
            dead,
        }
    }

    /// A queue in this state.
    ///
    /// # Errors
    ///
    /// When sizes or alignments are none that a driver could have set.
    pub fn to_queue(&self) -> Result<Queue, virtio_queue::Error> {
        Queue::try_from(virtio_queue::QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: self.event_idx,
            size: self.size,
            ready: self.ready,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
        })
    }
}

/// A device in service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// Its queues in their order.
    pub queues: Vec<QueueState>,
    /// What else it knows.
    pub own: OwnState,
}

/// What a device knows beside its queues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OwnState {
    /// Nothing: a disk's content is its file's, entropy is the host's, and a page in the balloon is
    /// one that is not resident.
    Nothing,
    /// Streams, without their host sockets.
    Vsock(MuxerState),
    /// A network device; packets under way are lost, as they may be on any network.
    Net(NetState),
}

/// A device with its transport.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioState {
    /// The transport's registers.
    pub transport: TransportState,
    /// The queues as their registers show them.
    pub queues: Vec<QueueState>,
    /// The device, if it is in service and can tell.
    pub device: Option<DeviceState>,
}

//! State of a virtio device as plain data, without sockets, files and threads. Queues can be made
//! from it again.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use virtio_queue::{Queue, QueueT};

/// State of a queue (virtio 1.2, 2.7). Addresses are guest physical. Sizes and indices count
/// chains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// True once the driver has set the queue up.
    pub ready: bool,
    /// Largest size that the device supports.
    pub max_size: u16,
    /// Size that the driver chose.
    pub size: u16,
    /// Address of the descriptor table.
    pub desc_table: u64,
    /// Address of the available ring.
    pub avail_ring: u64,
    /// Address of the used ring.
    pub used_ring: u64,
    /// Next entry of the available ring to read.
    pub next_avail: u16,
    /// Next entry of the used ring to write.
    pub next_used: u16,
    /// True if `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// True if the queue is not used until a reset.
    pub dead: bool,
}

impl QueueState {
    /// Returns the state of `queue`.
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

    /// Creates a queue in this state.
    ///
    /// # Errors
    ///
    /// When a driver could not have set these sizes or alignments.
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

/// State of a device in service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// The queues in order.
    pub queues: Vec<QueueState>,
    /// The rest of the device's state.
    pub own: OwnState,
}

/// State of a device beside its queues, empty by default. It is JSON of a type that only the device
/// names.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OwnState(Box<RawValue>);

impl OwnState {
    /// Serialises a device's own type. `None` if the type cannot be JSON.
    pub fn of(state: &impl Serialize) -> Option<Self> {
        to_raw_value(state).ok().map(Self)
    }

    /// Deserialises the device's own type.
    ///
    /// # Errors
    ///
    /// When the state is that of another type of device.
    pub fn read<T: DeserializeOwned>(&self) -> serde_json::Result<T> {
        serde_json::from_str(self.0.get())
    }
}

impl PartialEq for OwnState {
    fn eq(&self, other: &Self) -> bool {
        self.0.get() == other.0.get()
    }
}

impl Eq for OwnState {}

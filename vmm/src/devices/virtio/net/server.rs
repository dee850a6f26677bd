//! Servers of queue pairs, and the resources that they need.

use std::sync::Arc;

use super::tap::Tap;
use crate::devices::virtio::queue::ActiveQueue;
use crate::devices::virtio::state::QueueState;
use crate::devices::virtio::worker::Hold;
use crate::memory::GuestMemoryMap;

/// A queue pair, and the resources to serve it.
pub(super) struct QueuePairParts {
    pub(super) tap: Arc<Tap>,
    pub(super) memory: GuestMemoryMap,
    /// The features that the driver accepted.
    pub(super) features: u64,
    pub(super) mtu: Option<u16>,
    /// Receive and transmit queue.
    pub(super) queues: [ActiveQueue; 2],
}

/// A server of one queue pair.
pub(super) trait PairServer: Hold + Send {
    /// Returns the state of receive and transmit queue, while the server is held.
    fn queues(&self) -> Option<[QueueState; 2]>;
}

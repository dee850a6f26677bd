//! The trait of virtio devices, by which their transport drives them.

use std::io;
use std::sync::Arc;

use super::queue::ActiveQueue;
use super::state::DeviceState;
use super::worker::Hold;
use crate::end::EndSignal;
use crate::memory::GuestMemoryMap;

/// A device behind the transport. It is inactive until the driver sets `DRIVER_OK`.
pub trait VirtioDevice: Send {
    /// Returns the virtio device id (5).
    fn device_type(&self) -> u32;

    /// Returns the largest size of each queue.
    fn queue_sizes(&self) -> &[u16];

    /// Returns the device's feature bits, without those of the transport.
    fn features(&self) -> u64;

    /// Fills `data` from the configuration space at `offset`. Bytes beyond the end are zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Returns true if the device can serve a driver that accepted these features. All were
    /// offered.
    fn accepts(&self, _features: u64) -> bool {
        true
    }

    /// Returns true if a thread serves queue `index` and waits for its eventfd.
    ///
    /// Otherwise the vCPU that kicks the queue calls [`VirtioDevice::notify`], which suits small,
    /// rare work.
    fn has_worker(&self, index: usize) -> bool;

    /// Begins to serve the queues.
    ///
    /// # Errors
    ///
    /// When the device's threads cannot be made. The driver then sees `DEVICE_NEEDS_RESET`.
    fn activate(&mut self, active: Activation) -> io::Result<()>;

    /// Serves queue `index`, which has no worker, after a kick of the driver.
    fn notify(&mut self, _index: usize) {}

    /// Stops serving. After the return nothing touches guest memory or the queues.
    fn reset(&mut self);

    /// Returns the workers that serve the queues and can be held. `None` for a device without any.
    fn server(&mut self) -> Option<&mut dyn Hold> {
        None
    }

    /// Stops the workers, so that [`VirtioDevice::state`] can be read. The vCPUs are paused
    /// meanwhile, so a device without workers has no work.
    fn hold(&mut self) {
        if let Some(server) = self.server() {
            server.hold();
        }
    }

    /// Continues after [`VirtioDevice::hold`].
    ///
    /// # Errors
    ///
    /// When the device's threads cannot be made. The device then serves no more.
    fn resume(&mut self) -> io::Result<()> {
        self.server().map_or(Ok(()), Hold::resume)
    }

    /// Returns the state of a held device. `None` when the device is not in service.
    ///
    /// The file system device has no state yet: descriptors of nodes and handles would have to be
    /// opened again by their names.
    fn state(&self) -> Option<DeviceState> {
        None
    }
}

/// Returns the name of a device type for messages (5).
pub fn device_name(device_type: u32) -> &'static str {
    match device_type {
        1 => "network",
        2 => "block",
        4 => "entropy",
        5 => "balloon",
        19 => "socket",
        26 => "file system",
        _ => "virtio",
    }
}

/// Resources of a device whose driver is ready.
pub struct Activation {
    /// Guest memory, for the queues and their buffers.
    pub memory: GuestMemoryMap,
    /// The features that the driver accepted.
    pub features: u64,
    /// The queues in order. Queues that the driver did not set up stay silent.
    pub queues: Vec<ActiveQueue>,
    /// The signal to give when the device cannot go on.
    pub end: Arc<EndSignal>,
}

/// Copies from a configuration space, for [`VirtioDevice::read_config`].
pub(super) fn read_from(config: &[u8], offset: u64, data: &mut [u8]) {
    let available = usize::try_from(offset).ok().and_then(|o| config.get(o..)).unwrap_or_default();
    let len = available.len().min(data.len());
    data[..len].copy_from_slice(&available[..len]);
    data[len..].fill(0);
}

//! Socket device (virtio 1.2, 5.10): streams between guest and host over unix sockets.
//!
//! ```text
//!   host process --- listen_fd: "CONNECT <port>\n" ---> Muxer <=== queues ===> guest
//!   sandbox process <--- connect_fd: port + socket ----   |
//!                                                  Connection (credit, buffers)
//! ```

mod connection;
pub(in crate::devices::virtio) mod muxer;
pub(in crate::devices::virtio) mod packet;
mod state;

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

pub use self::muxer::StreamBytes;
use self::muxer::{HostSide, Muxer};
pub use self::state::{ConnectionState, MuxerState, StreamState};
use super::device::{Activation, VirtioDevice, read_from};
use super::queue::ActiveQueue;
use super::state::{DeviceState, OwnState};
use super::worker::{Hold, Worker};

const DEVICE_TYPE: u32 = 19;

/// Sizes of receive, transmit and event queue.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
const EVENT: usize = 2;

/// The socket device.
pub struct Vsock {
    guest_cid: u64,
    host: Arc<HostSide>,
    worker: Option<Worker<Muxer>>,
    /// The event queue, which has no use here.
    event: Option<ActiveQueue>,
}

impl Vsock {
    /// Creates a device for the guest with this context id.
    ///
    /// `listener` accepts connections to the guest. `connector` sends the connections from the
    /// guest.
    pub fn new(
        guest_cid: u32,
        listener: UnixListener,
        connector: std::os::unix::net::UnixDatagram,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        connector.set_nonblocking(true)?;
        let host = Arc::new(HostSide { listener, connector, bytes: Arc::default() });
        Ok(Self { guest_cid: guest_cid.into(), host, worker: None, event: None })
    }

    /// Returns the counters of the bytes of all streams.
    pub fn bytes(&self) -> Arc<StreamBytes> {
        Arc::clone(&self.host.bytes)
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_from(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn has_worker(&self, index: usize) -> bool {
        // The event queue reports migrations only, and there are none.
        index != EVENT
    }

    fn activate(&mut self, active: Activation) -> io::Result<()> {
        let [receive, transmit, event] = <[_; 3]>::try_from(active.queues)
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let host = Arc::clone(&self.host);
        let muxer = Muxer::new(self.guest_cid, host, active.memory, receive, transmit)?;
        self.event = Some(event);
        self.worker = Some(Worker::start("vsock", muxer, active.end, Muxer::run)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
        self.event = None;
    }

    fn server(&mut self) -> Option<&mut dyn Hold> {
        self.worker.as_mut().map(|worker| worker as &mut dyn Hold)
    }

    fn state(&self) -> Option<DeviceState> {
        let muxer = self.worker.as_ref()?.held()?;
        let [receive, transmit] = muxer.queues();
        let queues = vec![receive, transmit, self.event.as_ref()?.state()];
        Some(DeviceState { queues, own: OwnState::of(&muxer.state())? })
    }
}

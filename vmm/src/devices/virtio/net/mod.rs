//! Network device (virtio 1.2, 5.1) over the queues of a tap.
//!
//! ```text
//!   receiveq 1 <--- QueuePair (a thread), or vhost-net ---\
//!   transmitq 1 --> QueuePair (the same), or vhost-net ----+== tap, multi-queue
//!   receiveq 2, transmitq 2 ...                           /
//!   controlq ----> Control, on the vCPU that asks: how many pairs are in use
//! ```
//!
//! The kernel moves packets between the tap and the guest's buffers. The VMM copies only the part
//! of a packet for which the driver had no room yet. Checksums and segmentation are left to the
//! last hop. The guest controls the headers that ask for them, and the kernel checks each header
//! (`virtio_net_hdr_to_skb`).

mod control;
mod deferred;
mod features;
mod packet;
mod queue_pair;
mod receive;
mod server;
mod tap;
mod vhost;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use self::control::Control;
use self::deferred::{DeferredPair, DeferredVhost};
use self::queue_pair::QueuePair;
use self::server::{PairServer, QueuePairParts};
use self::tap::Tap;
use self::vhost::{VhostNet, VhostPair};
use super::device::{Activation, VirtioDevice, read_from};
use super::state::{DeviceState, OwnState};
use super::worker::{Hold, Worker};
use crate::config::NetConfig;
use crate::end::EndSignal;

const DEVICE_TYPE: u32 = 1;

/// Size of a receive or transmit queue.
const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 16;

const LINK_UP: u16 = 1;

/// Reasons why a network device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A queue of the tap cannot be used.
    #[error("queue {queue} of its tap: {source}")]
    Tap {
        /// Number of the queue, counted from 0.
        queue: usize,
        /// The cause.
        source: io::Error,
    },
    /// The host's vhost-net cannot be used.
    #[error("vhost-net: {0}")]
    Vhost(io::Error),
}

/// Part of the host's kernel in serving the queues.
enum Vhost {
    /// The VMM serves all queue pairs.
    None,
    /// The kernel serves all queue pairs, each by its descriptor.
    Open(Vec<Arc<VhostNet>>),
    /// The kernel serves the pairs whose descriptor has come before the first use.
    Deferred(Arc<DeferredVhost>),
}

/// A network interface of the guest.
pub struct Net {
    taps: Vec<Arc<Tap>>,
    vhost: Vhost,
    mac: [u8; 6],
    mtu: Option<u16>,
    features: u64,
    queue_sizes: Vec<u16>,
    active: Option<Active>,
}

struct Active {
    pairs: QueuePairs,
    control: Option<Control>,
}

/// State of a network device beside its queues. Packets under way are lost, as they may be on any
/// network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// Number of queue pairs in use, counted from the first.
    pub active_pairs: u16,
}

impl Net {
    /// Creates an interface over the queues of one tap, which must be attached.
    ///
    /// The kernel moves the packets of a queue pair that has a descriptor of `/dev/vhost-net`. The
    /// descriptors are given, as many as queues, or come by `vhost_socket` before the driver's
    /// first kick.
    ///
    /// # Errors
    ///
    /// When a descriptor is of the wrong kind, or the host's kernel lacks a feature.
    pub fn new(
        taps: Vec<OwnedFd>,
        vhost: Vec<OwnedFd>,
        vhost_socket: Option<OwnedFd>,
        config: &NetConfig,
    ) -> Result<Self, NetError> {
        let taps: Vec<_> = (0..)
            .zip(taps)
            .map(|(queue, fd)| {
                Tap::new(fd).map(Arc::new).map_err(|source| NetError::Tap { queue, source })
            })
            .collect::<Result<_, _>>()?;
        let vhost = match vhost_socket {
            Some(fd) => DeferredVhost::new(fd).map(|vhost| Vhost::Deferred(Arc::new(vhost))),
            None if vhost.is_empty() => Ok(Vhost::None),
            None => {
                let open = vhost.into_iter().map(|fd| VhostNet::new(fd).map(Arc::new));
                open.collect::<io::Result<_>>().map(Vhost::Open)
            }
        }
        .map_err(NetError::Vhost)?;
        let mut offered = features::MAC | features::STATUS;
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * taps.len()];
        if let Some(tap) = taps.first() {
            offered |= features::of_tap(|offloads| tap.set_offloads(offloads).is_ok());
            // The driver has accepted no offload yet.
            tap.set_offloads(0).map_err(|source| NetError::Tap { queue: 0, source })?;
        }
        if config.mtu.is_some() {
            offered |= features::MTU;
        }
        if taps.len() > 1 {
            offered |= features::CTRL_VQ | features::MQ;
            queue_sizes.push(CONTROL_QUEUE_SIZE);
        }
        let (mac, mtu) = (config.mac, config.mtu);
        Ok(Self { taps, vhost, mac, mtu, features: offered, queue_sizes, active: None })
    }

    /// Creates the server of one queue pair, held.
    fn new_server(
        &self,
        index: usize,
        parts: QueuePairParts,
        end: &Arc<EndSignal>,
    ) -> Box<dyn PairServer> {
        let end = Arc::clone(end);
        match &self.vhost {
            Vhost::Open(vhost) => Box::new(VhostPair::new(Arc::clone(&vhost[index]), parts)),
            Vhost::Deferred(vhost) => {
                let pair = DeferredPair::new(index, Arc::clone(vhost), parts);
                Box::new(Worker::new("net", pair, end, DeferredPair::run))
            }
            Vhost::None => Box::new(Worker::new("net", QueuePair::new(parts), end, QueuePair::run)),
        }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // mac, status, max_virtqueue_pairs, mtu (5.1.4).
        let mut config = [0u8; 12];
        config[..6].copy_from_slice(&self.mac);
        config[6..8].copy_from_slice(&LINK_UP.to_le_bytes());
        config[8..10].copy_from_slice(&(self.taps.len() as u16).to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        read_from(&config, offset, data);
    }

    fn accepts(&self, features: u64) -> bool {
        // Without multi-queue the control queue would be the third (5.1.2), whose kicks go to a
        // worker here. It would also have no use.
        let control = features & features::CTRL_VQ != 0;
        control == (features & features::MQ != 0)
    }

    fn has_worker(&self, index: usize) -> bool {
        index < 2 * self.taps.len()
    }

    fn activate(&mut self, active: Activation) -> io::Result<()> {
        let Activation { memory, features, queues, end } = active;
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        self.taps.first().ok_or_else(invalid)?.set_offloads(features::offloads(features))?;
        let mut queues = queues.into_iter();
        let mut servers = Vec::with_capacity(self.taps.len());
        for index in 0..self.taps.len() {
            let queues = [queues.next().ok_or_else(invalid)?, queues.next().ok_or_else(invalid)?];
            let (tap, memory) = (Arc::clone(&self.taps[index]), memory.clone());
            let parts = QueuePairParts { tap, memory, features, mtu: self.mtu, queues };
            servers.push(self.new_server(index, parts, &end));
        }
        // All queues were attached when they came. The driver begins with the first pair (5.1.5).
        let mut pairs = QueuePairs { taps: self.taps.clone(), servers, active: self.taps.len() };
        pairs.set_active(1)?;
        let control = queues.next().map(|queue| Control::new(memory, queue));
        self.active = Some(Active { pairs, control });
        // In service before the first kick.
        self.server().map_or(Ok(()), Hold::resume)
    }

    fn notify(&mut self, _index: usize) {
        let Some(Active { pairs, control: Some(control) }) = &mut self.active else { return };
        control.serve(|wanted| pairs.set_active(wanted.into()).is_ok());
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn server(&mut self) -> Option<&mut dyn Hold> {
        self.active.as_mut().map(|active| &mut active.pairs as &mut dyn Hold)
    }

    fn state(&self) -> Option<DeviceState> {
        let Active { pairs, control } = self.active.as_ref()?;
        let mut queues = Vec::with_capacity(self.queue_sizes.len());
        for server in &pairs.servers {
            queues.extend(server.queues()?);
        }
        queues.extend(control.as_ref().map(|control| control.queue.state()));
        let own = OwnState::of(&NetState { active_pairs: pairs.active as u16 })?;
        Some(DeviceState { queues, own })
    }
}

/// All queue pairs. The first `active` are in use.
struct QueuePairs {
    taps: Vec<Arc<Tap>>,
    servers: Vec<Box<dyn PairServer>>,
    active: usize,
}

impl QueuePairs {
    /// Puts the first `wanted` pairs into service, and no others. After an error some pairs may
    /// have changed.
    fn set_active(&mut self, wanted: usize) -> io::Result<()> {
        if wanted == 0 || wanted > self.servers.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        while self.active > wanted {
            let last = self.active - 1;
            self.servers[last].hold();
            // The kernel spreads packets over all attached queues.
            self.taps[last].attach(false)?;
            self.active = last;
        }
        while self.active < wanted {
            let next = self.active;
            self.taps[next].attach(true)?;
            self.servers[next].resume()?;
            self.active += 1;
        }
        Ok(())
    }
}

impl Hold for QueuePairs {
    fn hold(&mut self) {
        self.servers.iter_mut().for_each(|server| server.hold());
    }

    fn resume(&mut self) -> io::Result<()> {
        self.servers.iter_mut().take(self.active).try_for_each(|server| server.resume())
    }
}

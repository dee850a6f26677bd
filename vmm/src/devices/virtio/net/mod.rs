//! Network device (virtio 1.2, 5.1) over the queues of a tap.
//!
//! ```text
//!   receiveq 1 <--- Pair (a thread), or vhost-net ---\
//!   transmitq 1 --> Pair (the same), or vhost-net ----+== tap, multi-queue
//!   receiveq 2, transmitq 2 ...                      /
//!   controlq ----> Control, on the vCPU that asks: how many pairs are in use
//! ```
//!
//! Packets are never copied here: the kernel moves them between the tap and the guest's buffers, with
//! checksums and segmentation left to whoever does them last. The headers that ask for that are the
//! guest's word; the kernel checks them where it reads them (`virtio_net_hdr_to_skb`).

mod control;
mod features;
mod late;
mod pair;
mod receive;
mod tap;
mod vhost;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use self::control::Control;
use self::late::{LatePair, LateVhost};
use self::pair::Pair;
use self::tap::Tap;
use self::vhost::{VhostNet, VhostPair};
use super::state::{DeviceState, OwnState, QueueState};
use super::worker::{Hold, Worker};
use super::{Activation, ActiveQueue, VirtioDevice, read_from};
use crate::config::NetConfig;
use crate::end::EndSignal;
use crate::memory::GuestMemoryMap;

const DEVICE_TYPE: u32 = 1;

/// A receive or a transmit queue.
const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 16;

/// The header before each packet (`struct virtio_net_hdr_v1`, 5.1.6).
const HEADER_LEN: usize = 12;

/// More than any packet with its header: 64 KiB of payload and 4 KiB for the headers of all layers.
const MAX_PACKET_LEN: usize = 68 << 10;

const LINK_UP: u16 = 1;

/// Why a network device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A tap.
    #[error("queue {queue} of its tap: {source}")]
    Tap {
        /// Which, counted from 0.
        queue: usize,
        /// What is wrong with it.
        source: io::Error,
    },
    /// The host's vhost-net.
    #[error("vhost-net: {0}")]
    Vhost(io::Error),
}

/// What the host's kernel has to do with the queues.
enum Vhost {
    /// Nothing.
    None,
    /// It serves them, by one descriptor for each pair.
    Open(Vec<Arc<VhostNet>>),
    /// It serves those whose descriptor has come before they are first used.
    Late(Arc<LateVhost>),
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
    pairs: Pairs,
    control: Option<Control>,
}

/// What a network device knows beside its queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// How many queue pairs are in use, counted from the first.
    pub active_pairs: u16,
}

impl Net {
    /// An interface whose wire are the queues of one tap, which have to be attached. Packets are
    /// moved by the kernel if there are descriptors of `/dev/vhost-net`, as many as queues, or if they
    /// come by `vhost_socket` before the driver's first kick.
    ///
    /// # Errors
    ///
    /// When a descriptor is none of the kind, or the host's kernel lacks what is needed.
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
            Some(fd) => LateVhost::new(fd).map(|late| Vhost::Late(Arc::new(late))),
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
            // Until a driver wants more.
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

    /// What serves the queues of one pair, held.
    fn new_server(&self, index: usize, parts: Parts, end: &Arc<EndSignal>) -> Box<dyn Server> {
        let end = Arc::clone(end);
        match &self.vhost {
            Vhost::Open(vhost) => Box::new(VhostPair::new(Arc::clone(&vhost[index]), parts)),
            Vhost::Late(vhost) => {
                let pair = LatePair::new(index, Arc::clone(vhost), parts);
                Box::new(Worker::new("net", pair, end, LatePair::run))
            }
            Vhost::None => Box::new(Worker::new("net", Pair::new(parts), end, Pair::run)),
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
        // worker here; and there would be nothing to control.
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
            let parts = Parts { tap, memory, features, mtu: self.mtu, queues };
            servers.push(self.new_server(index, parts, &end));
        }
        // All were attached when they came; the driver begins with the first (5.1.5).
        let mut pairs = Pairs { taps: self.taps.clone(), servers, active: self.taps.len() };
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
        let own = OwnState::Net(NetState { active_pairs: pairs.active as u16 });
        Some(DeviceState { queues, own })
    }
}

/// A queue pair, and what is to be known to serve it.
struct Parts {
    tap: Arc<Tap>,
    memory: GuestMemoryMap,
    /// Those that the driver accepted.
    features: u64,
    mtu: Option<u16>,
    /// Receive and transmit.
    queues: [ActiveQueue; 2],
}

/// What serves a queue pair.
trait Server: Hold + Send {
    /// Receive and transmit queue, while it is held.
    fn queues(&self) -> Option<[QueueState; 2]>;
}

impl Server for Worker<Pair> {
    fn queues(&self) -> Option<[QueueState; 2]> {
        self.held().map(Pair::queues)
    }
}

/// All queue pairs, of which the first `active` are in use.
struct Pairs {
    taps: Vec<Arc<Tap>>,
    servers: Vec<Box<dyn Server>>,
    active: usize,
}

impl Pairs {
    /// Puts the first `wanted` into service, and no others.
    ///
    /// # Errors
    ///
    /// When there are not so many, or the host refuses; some of them may have been changed.
    fn set_active(&mut self, wanted: usize) -> io::Result<()> {
        if wanted == 0 || wanted > self.servers.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        while self.active > wanted {
            let last = self.active - 1;
            self.servers[last].hold();
            // The kernel spreads packets over all queues that are attached.
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

impl Hold for Pairs {
    fn hold(&mut self) {
        self.servers.iter_mut().for_each(|server| server.hold());
    }

    fn resume(&mut self) -> io::Result<()> {
        self.servers.iter_mut().take(self.active).try_for_each(|server| server.resume())
    }
}

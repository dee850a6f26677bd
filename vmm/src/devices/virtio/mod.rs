//! Virtio devices (OASIS virtio 1.2) and their MMIO transport.

pub mod balloon;
pub mod block;
pub mod chain;
pub mod fs;
pub mod mmio;
pub mod rng;
pub mod state;
#[cfg(test)]
mod tests;
pub mod vsock;
pub mod worker;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use self::state::{DeviceState, QueueState};
use self::worker::Hold;
use crate::end::EndSignal;
use crate::memory::GuestMemoryMap;

/// Bit of `InterruptStatus` that says that a used ring has changed (4.2.2).
const INTERRUPT_USED_RING: u32 = 1;

/// A device behind the transport. It is inactive until the driver says `DRIVER_OK`.
pub trait VirtioDevice: Send {
    /// Virtio device id (5).
    fn device_type(&self) -> u32;

    /// Largest size of each of its queues.
    fn queue_sizes(&self) -> &[u16];

    /// Features it offers beside those of the transport.
    fn features(&self) -> u64;

    /// Fills `data` from its configuration space at `offset`; zeros beyond the end.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Whether queue `index` is served by a thread that waits for its eventfd. Else
    /// [`VirtioDevice::notify`] is called on the vCPU that kicked it, which suits small, rare work.
    fn has_worker(&self, index: usize) -> bool;

    /// Begins to serve the queues.
    ///
    /// # Errors
    ///
    /// When its threads cannot be made; the driver then sees `DEVICE_NEEDS_RESET`.
    fn activate(&mut self, active: Activation) -> io::Result<()>;

    /// The driver kicked queue `index`, which has no worker.
    fn notify(&mut self, _index: usize) {}

    /// Stops serving. When it returns, nothing touches guest memory or the queues any more.
    fn reset(&mut self);

    /// What serves its queues beside the vCPUs, and can be held. `None` when nothing does.
    fn server(&mut self) -> Option<&mut dyn Hold> {
        None
    }

    /// Ends the workers for a while, so that [`VirtioDevice::state`] can be read. The vCPUs are
    /// paused meanwhile, so that a device without workers has nothing to do.
    fn hold(&mut self) {
        if let Some(server) = self.server() {
            server.hold();
        }
    }

    /// Goes on after [`VirtioDevice::hold`], where it was.
    ///
    /// # Errors
    ///
    /// When its threads cannot be made; it then serves no more.
    fn resume(&mut self) -> io::Result<()> {
        self.server().map_or(Ok(()), Hold::resume)
    }

    /// What it is while held. `None` when it is not in service. The file system device has none yet:
    /// nodes and handles that the guest knows live in fuse-backend-rs, which does not show them.
    fn state(&self) -> Option<DeviceState> {
        None
    }
}

/// The name of a device type, for messages (5).
pub fn name(device_type: u32) -> &'static str {
    match device_type {
        2 => "block",
        4 => "entropy",
        5 => "balloon",
        19 => "socket",
        26 => "file system",
        _ => "virtio",
    }
}

/// What a device gets when its driver is ready.
pub struct Activation {
    /// Guest memory, for the queues and what they point to.
    pub memory: GuestMemoryMap,
    /// The queues in their order. Those that the driver did not set up stay silent.
    pub queues: Vec<ActiveQueue>,
    /// To be given when the device cannot go on.
    pub end: Arc<EndSignal>,
}

/// A queue, its kick, and its interrupt.
pub struct ActiveQueue {
    queue: Queue,
    kick: EventFd,
    interrupt: Interrupt,
    /// The driver did not set the queue up, or broke it: it is left alone until a reset.
    dead: bool,
}

impl ActiveQueue {
    /// A queue whose rings lie in guest memory, or one that the driver does without, which is not
    /// ready and stays silent.
    fn new(queue: Queue, kick: EventFd, interrupt: Interrupt) -> Self {
        let dead = !queue.ready();
        Self { queue, kick, interrupt, dead }
    }

    /// A queue that goes on where one with this state stopped.
    ///
    /// # Errors
    ///
    /// When it could not have been set up in this memory.
    pub fn from_state(
        state: &QueueState,
        memory: &GuestMemoryMap,
        kick: EventFd,
        interrupt: Interrupt,
    ) -> io::Result<Self> {
        let queue = state.to_queue().map_err(io::Error::other)?;
        if queue.ready() && !mmio::rings_are_in_memory(&queue, memory) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a ring lies outside memory"));
        }
        Ok(Self { queue, kick, interrupt, dead: state.dead || !state.ready })
    }

    /// Its state, to be read between requests.
    pub fn state(&self) -> QueueState {
        QueueState::of(&self.queue, self.dead)
    }

    /// The eventfd that the driver's kicks arrive on.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Takes the next chain that the driver made available, checked and mapped.
    ///
    /// A chain that is not valid is given back unused, and the next is tried, for one turn of the
    /// ring: who makes nothing but invalid chains must not keep the caller here.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemoryMap) -> Option<chain::Chain<'m>> {
        let size = self.queue.size();
        for _ in 0..size {
            let descriptors = self.pop_raw(memory)?;
            let head = descriptors.head_index();
            match chain::Chain::new(memory, descriptors, size) {
                Ok(chain) => return Some(chain),
                Err(_) => {
                    self.push(memory, head, 0);
                    self.signal(memory);
                }
            }
        }
        None
    }

    /// Takes the next chain as it is, for a crate that does its own checks.
    pub fn pop_raw<'m>(
        &mut self,
        memory: &'m GuestMemoryMap,
    ) -> Option<DescriptorChain<&'m GuestMemoryMap>> {
        if self.dead {
            return None;
        }
        match self.queue.iter(memory) {
            Ok(mut available) => available.next(),
            // The driver's index is further ahead than the ring is long. It would stay so, and the
            // queue would never look drained.
            Err(_) => {
                self.dead = true;
                None
            }
        }
    }

    /// Puts back the chain that was popped last, so that the next pop returns it again.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back with `len` bytes written to it.
    pub fn push(&mut self, memory: &GuestMemoryMap, head: u16, len: u32) {
        // It fails when the head is none of the ring's: nobody waits for that chain.
        let _ = self.queue.add_used(memory, head, len);
    }

    /// Tells the driver of used chains, if it wants to know.
    pub fn signal(&mut self, memory: &GuestMemoryMap) {
        if !self.dead && self.queue.needs_notification(memory).unwrap_or(true) {
            self.interrupt.trigger();
        }
    }

    /// Asks for kicks again after a drained queue. True when chains came in meanwhile, and the
    /// caller has to go on without a kick.
    ///
    /// Without this call, a driver that negotiated event indices kicks only once.
    pub fn enable_kicks(&mut self, memory: &GuestMemoryMap) -> bool {
        !self.dead && self.queue.enable_notification(memory).unwrap_or(false)
    }

    /// Does without kicks while a queue is being drained.
    pub fn disable_kicks(&mut self, memory: &GuestMemoryMap) {
        if !self.dead {
            let _ = self.queue.disable_notification(memory);
        }
    }
}

/// The interrupt line of one device.
#[derive(Clone)]
pub struct Interrupt {
    status: Arc<AtomicU32>,
    line: Arc<EventFd>,
}

impl Interrupt {
    /// A line that is raised through `line`, an irqfd.
    pub fn new(line: EventFd) -> Self {
        Self { status: Arc::default(), line: Arc::new(line) }
    }

    fn trigger(&self) {
        self.status.fetch_or(INTERRUPT_USED_RING, Ordering::SeqCst);
        // It only fails when the counter is full, and then the interrupt is pending already.
        let _ = self.line.write(1);
    }
}

/// Copies from a configuration space, as [`VirtioDevice::read_config`] wants it.
fn read_from(config: &[u8], offset: u64, data: &mut [u8]) {
    let available = usize::try_from(offset).ok().and_then(|o| config.get(o..)).unwrap_or_default();
    let len = available.len().min(data.len());
    data[..len].copy_from_slice(&available[..len]);
    data[len..].fill(0);
}

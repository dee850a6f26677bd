//! Virtio devices (OASIS virtio 1.2) and their MMIO transport.

pub mod balloon;
pub mod block;
pub mod chain;
pub mod fs;
pub mod mmio;
pub mod net;
pub mod registers;
pub mod rng;
pub mod state;
#[cfg(test)]
mod tests;
pub mod vsock;
pub mod worker;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use self::state::{DeviceState, QueueState};
use self::worker::Hold;
use crate::end::EndSignal;
use crate::memory::GuestMemoryMap;

/// Bit of `InterruptStatus` that says that a used ring may have changed (4.2.2).
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

    /// Whether it can serve a driver that accepted these features, all of which were offered.
    fn accepts(&self, _features: u64) -> bool {
        true
    }

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
    /// descriptors of nodes and handles would have to be opened again by their names.
    fn state(&self) -> Option<DeviceState> {
        None
    }
}

/// The name of a device type, for messages (5).
pub fn name(device_type: u32) -> &'static str {
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

/// What a device gets when its driver is ready.
pub struct Activation {
    /// Guest memory, for the queues and what they point to.
    pub memory: GuestMemoryMap,
    /// The features that the driver accepted.
    pub features: u64,
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
    /// The used index when the driver was last considered for an interrupt.
    signalled: u16,
    /// The driver did not set the queue up, or broke it: it is left alone until a reset.
    dead: bool,
}

impl ActiveQueue {
    /// A queue whose rings lie in guest memory, or one that the driver does without, which is not
    /// ready and stays silent.
    fn new(queue: Queue, kick: EventFd, interrupt: Interrupt) -> Self {
        let dead = !queue.ready();
        Self { queue, kick, interrupt, signalled: 0, dead }
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
        let (signalled, dead) = (state.next_used, state.dead || !state.ready);
        Ok(Self { queue, kick, interrupt, signalled, dead })
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

    /// Takes the next chain of buffers that are all written by the device, or all read, and puts
    /// them behind those in `buffers`. Returns its head and the sum of the buffers' lengths.
    ///
    /// A chain that is not valid is treated as [`ActiveQueue::pop`] does.
    pub fn pop_one_way<'m>(
        &mut self,
        memory: &'m GuestMemoryMap,
        writable: bool,
        buffers: &mut Vec<VolatileSlice<'m>>,
    ) -> Option<(u16, usize)> {
        let (size, before) = (self.queue.size(), buffers.len());
        for _ in 0..size {
            let descriptors = self.pop_raw(memory)?;
            let head = descriptors.head_index();
            let mut len = 0;
            let mut one_way = true;
            let valid = chain::walk(memory, descriptors, size, |slice, is_writable| {
                one_way &= is_writable == writable;
                len += slice.len();
                buffers.push(slice);
            });
            if valid.is_ok() && one_way {
                return Some((head, len));
            }
            buffers.truncate(before);
            self.push(memory, head, 0);
            self.signal(memory);
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

    /// How many chains it can hold.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Gives a chain back with `len` bytes written to it.
    pub fn push(&mut self, memory: &GuestMemoryMap, head: u16, len: u32) {
        self.stage(memory, head, len);
        self.publish(memory);
    }

    /// Writes a used chain behind those that the driver knows of, to be seen with the next
    /// [`ActiveQueue::publish`]. There are never more of them than were popped, and so never more
    /// than the ring is long.
    pub fn stage(&mut self, memory: &GuestMemoryMap, head: u16, len: u32) {
        // Nobody waits for a chain whose head is none of the ring's.
        if head >= self.queue.size() {
            return;
        }
        let next = self.queue.next_used();
        let slot = 4 + 8 * u64::from(next % self.queue.size());
        let entry = [u32::from(head).to_le(), len.to_le()];
        // The rings were found to be in memory before the queue was made.
        let _ = memory.write_obj(entry, self.used_ring(slot));
        self.queue.set_next_used(next.wrapping_add(1));
    }

    /// Shows the driver all used chains, at once.
    pub fn publish(&mut self, memory: &GuestMemoryMap) {
        let index = self.queue.next_used().to_le();
        // Release: who sees the index sees the entries, and what was written to the buffers.
        let _ = memory.store(index, self.used_ring(2), Ordering::Release);
    }

    fn used_ring(&self, offset: u64) -> GuestAddress {
        // Cannot overflow: the ring has an end.
        GuestAddress(self.queue.used_ring().wrapping_add(offset))
    }

    /// Tells the driver of used chains, if it wants to know (2.7.7.2).
    pub fn signal(&mut self, memory: &GuestMemoryMap) {
        if !self.dead && self.wants_interrupt(memory) {
            self.interrupt.trigger();
        }
    }

    /// The crate's own answer knows neither of chains that were published together nor of the flag.
    fn wants_interrupt(&mut self, memory: &GuestMemoryMap) -> bool {
        const NO_INTERRUPT: u16 = 1;
        let (old, new) = (self.signalled, self.queue.next_used());
        self.signalled = new;
        // The driver asks, then looks at the index; here it is written, then the wish is read.
        fence(Ordering::SeqCst);
        let available = self.queue.avail_ring();
        let wish = |offset: u64| {
            let at = GuestAddress(available.wrapping_add(offset));
            memory.load::<u16>(at, Ordering::Relaxed).map(u16::from_le)
        };
        if self.queue.event_idx_enabled() {
            let event = wish(4 + 2 * u64::from(self.queue.size()));
            event.is_ok_and(|event| new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
        } else {
            old != new && wish(0).is_ok_and(|flags| flags & NO_INTERRUPT == 0)
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
///
/// It is raised for used rings only, and belongs to this device alone. So `InterruptStatus` says for
/// as long as the device is in service that a ring may have changed, nothing has to be counted up or
/// acknowledged, and the host's kernel can raise the line as well.
#[derive(Clone)]
pub struct Interrupt(Arc<EventFd>);

impl Interrupt {
    /// A line that is raised through `line`, an irqfd.
    pub fn new(line: EventFd) -> Self {
        Self(Arc::new(line))
    }

    fn line(&self) -> &EventFd {
        &self.0
    }

    fn trigger(&self) {
        // It only fails when the counter is full, and then the interrupt is pending already.
        let _ = self.0.write(1);
    }
}

/// Copies from a configuration space, as [`VirtioDevice::read_config`] wants it.
fn read_from(config: &[u8], offset: u64, data: &mut [u8]) {
    let available = usize::try_from(offset).ok().and_then(|o| config.get(o..)).unwrap_or_default();
    let len = available.len().min(data.len());
    data[..len].copy_from_slice(&available[..len]);
    data[len..].fill(0);
}

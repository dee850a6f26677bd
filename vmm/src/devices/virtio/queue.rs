//! A queue in service: its rings, its kick, and its interrupt.

use std::io;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{self, Chain};
use super::interrupt::Interrupt;
use super::state::QueueState;
use crate::memory::GuestMemoryMap;

/// A queue, its kick, and its interrupt.
pub struct ActiveQueue {
    pub(super) queue: Queue,
    pub(super) kick: EventFd,
    pub(super) interrupt: Interrupt,
    /// The used index at the last check for an interrupt.
    signalled: u16,
    /// True if the driver did not set the queue up, or broke it. The queue is not used until a
    /// reset.
    pub(super) dead: bool,
}

impl ActiveQueue {
    /// Takes a queue into service. Its rings lie in guest memory, or the driver leaves it out, and
    /// it is not ready and stays silent.
    pub(super) fn new(queue: Queue, kick: EventFd, interrupt: Interrupt) -> Self {
        let dead = !queue.ready();
        Self { queue, kick, interrupt, signalled: 0, dead }
    }

    /// Creates a queue that continues from this state.
    ///
    /// # Errors
    ///
    /// When a driver could not have set the queue up in this memory.
    pub fn from_state(
        state: &QueueState,
        memory: &GuestMemoryMap,
        kick: EventFd,
        interrupt: Interrupt,
    ) -> io::Result<Self> {
        let queue = state.to_queue().map_err(io::Error::other)?;
        if queue.ready() && !rings_are_in_memory(&queue, memory) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a ring lies outside memory"));
        }
        let (signalled, dead) = (state.next_used, state.dead || !state.ready);
        Ok(Self { queue, kick, interrupt, signalled, dead })
    }

    /// Returns the state. The caller is between two requests.
    pub fn state(&self) -> QueueState {
        QueueState::of(&self.queue, self.dead)
    }

    /// Returns the eventfd of the driver's kicks.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Takes the next available chain, checked and mapped.
    ///
    /// An invalid chain is given back unused, and the next one is tried, for one turn of the ring.
    /// A driver that makes nothing but invalid chains must not keep the caller here.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemoryMap) -> Option<Chain<'m>> {
        let size = self.queue.size();
        for _ in 0..size {
            let descriptors = self.pop_raw(memory)?;
            let head = descriptors.head_index();
            match Chain::new(memory, descriptors, size) {
                Ok(chain) => return Some(chain),
                Err(_) => {
                    self.push(memory, head, 0);
                    self.signal(memory);
                }
            }
        }
        None
    }

    /// Takes the next chain whose buffers are all writable by the device, or all readable, and
    /// appends them to `buffers`. Returns the chain's head and the sum of the lengths.
    ///
    /// An invalid chain is handled as in [`ActiveQueue::pop`].
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

    /// Takes the next available chain unchecked, for a caller that checks it.
    pub fn pop_raw<'m>(
        &mut self,
        memory: &'m GuestMemoryMap,
    ) -> Option<DescriptorChain<&'m GuestMemoryMap>> {
        if self.dead {
            return None;
        }
        match self.queue.iter(memory) {
            Ok(mut available) => available.next(),
            // The driver's index is further ahead than the ring is long. It would stay there, and
            // the queue would never look drained.
            Err(_) => {
                self.dead = true;
                None
            }
        }
    }

    /// Puts back the chain that was popped last. The next pop returns it again.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns the number of entries of the ring.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Gives a chain back, with `len` bytes written to it.
    pub fn push(&mut self, memory: &GuestMemoryMap, head: u16, len: u32) {
        self.stage(memory, head, len);
        self.publish(memory);
    }

    /// Writes a used chain behind the published ones. [`ActiveQueue::publish`] makes it visible.
    ///
    /// At most as many chains are staged as were popped, and so at most as many as the ring is
    /// long.
    pub fn stage(&mut self, memory: &GuestMemoryMap, head: u16, len: u32) {
        // A head outside the ring belongs to no chain that a driver waits for.
        if head >= self.queue.size() {
            return;
        }
        let next = self.queue.next_used();
        let slot = 4 + 8 * u64::from(next % self.queue.size());
        let entry = [u32::from(head).to_le(), len.to_le()];
        // The rings were checked to lie in memory before the queue was made.
        let _ = memory.write_obj(entry, self.used_ring(slot));
        self.queue.set_next_used(next.wrapping_add(1));
    }

    /// Makes all staged chains visible to the driver, at once.
    pub fn publish(&mut self, memory: &GuestMemoryMap) {
        let index = self.queue.next_used().to_le();
        // Release: a driver that sees the index also sees the entries and the written buffers.
        let _ = memory.store(index, self.used_ring(2), Ordering::Release);
    }

    fn used_ring(&self, offset: u64) -> GuestAddress {
        // Cannot overflow, because the ring lies in memory.
        GuestAddress(self.queue.used_ring().wrapping_add(offset))
    }

    /// Raises the interrupt for used chains, if the driver wants one (2.7.7.2).
    pub fn signal(&mut self, memory: &GuestMemoryMap) {
        if !self.dead && self.wants_interrupt(memory) {
            self.interrupt.trigger();
        }
    }

    /// Returns true if the driver wants an interrupt. The crate's own check handles neither several
    /// chains published at once nor the flag.
    fn wants_interrupt(&mut self, memory: &GuestMemoryMap) -> bool {
        const NO_INTERRUPT: u16 = 1;
        let (old, new) = (self.signalled, self.queue.next_used());
        self.signalled = new;
        // The driver writes its wish and then reads the index. Here the index is written, then the
        // wish is read: the fence keeps that order.
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

    /// Enables kicks after the queue is drained. True if chains came in meanwhile: the caller must
    /// go on without a kick.
    ///
    /// Without this call, a driver that negotiated event indices kicks only once.
    pub fn enable_kicks(&mut self, memory: &GuestMemoryMap) -> bool {
        !self.dead && self.queue.enable_notification(memory).unwrap_or(false)
    }

    /// Disables kicks while the queue is being drained.
    pub fn disable_kicks(&mut self, memory: &GuestMemoryMap) {
        if !self.dead {
            let _ = self.queue.disable_notification(memory);
        }
    }
}

/// Returns true if all three parts of a queue lie in guest memory (2.7).
///
/// The crate's own check covers their ends only. A ring that begins in the hole of the address
/// space could never be drained.
pub(super) fn rings_are_in_memory(queue: &Queue, memory: &GuestMemoryMap) -> bool {
    let size = usize::from(queue.size());
    queue.is_valid(memory)
        && [
            (queue.desc_table(), 16 * size),
            (queue.avail_ring(), 6 + 2 * size),
            (queue.used_ring(), 6 + 8 * size),
        ]
        .into_iter()
        .all(|(start, len)| memory.check_range(GuestAddress(start), len))
}

//! Room for received packets, and the layout of a packet in it (5.1.6.3, 5.1.6.4).
//!
//! ```text
//!   chains taken from the ring:   | header, data | data | data |  ...       spare
//!   one packet of the tap:        |==============|======|==|                 (only the rest)
//!                                  num_buffers = 3
//! ```

use std::collections::VecDeque;

use vm_memory::VolatileSlice;

use super::packet::{HEADER_LEN, MAX_PACKET_LEN};
use crate::devices::virtio::chain::{IOV_MAX, iovec};
use crate::devices::virtio::queue::ActiveQueue;
use crate::memory::GuestMemoryMap;

/// Offset of `num_buffers` in the header.
const NUM_BUFFERS: usize = 10;

/// Chains that were taken from the ring, and hold no whole packet yet.
pub(super) struct Room<'m> {
    memory: &'m GuestMemoryMap,
    /// True if a packet may continue in the next chain.
    mergeable: bool,
    /// Length to gather, in bytes. No more chains are taken than needed.
    wanted: usize,
    chains: VecDeque<RoomChain>,
    /// Buffers of all chains, in their order.
    buffers: Vec<VolatileSlice<'m>>,
    /// Sum of the chains' lengths.
    len: usize,
    /// Room for the part of a packet that does not fit.
    spare: Vec<u8>,
    /// A packet that needs more room.
    waiting: Option<Waiting>,
}

struct RoomChain {
    head: u16,
    buffers: usize,
    len: usize,
}

/// A packet whose first `placed` bytes are in the chains, and the rest in the spare.
struct Waiting {
    len: usize,
    placed: usize,
}

impl<'m> Room<'m> {
    pub(super) fn new(memory: &'m GuestMemoryMap, mergeable: bool, wanted: usize) -> Self {
        Self {
            memory,
            mergeable,
            wanted,
            chains: VecDeque::new(),
            buffers: Vec::new(),
            len: 0,
            spare: vec![0; MAX_PACKET_LEN],
            waiting: None,
        }
    }

    /// Takes chains from the ring. True if a packet may be read into them.
    pub(super) fn gather(&mut self, queue: &mut ActiveQueue) -> bool {
        let wanted = self.waiting.as_ref().map_or(self.wanted, |packet| packet.len);
        // Without merging only the first chain counts. Chains given back at once count as well,
        // because a driver that offers only those must not keep the caller here.
        for _ in 0..queue.size() {
            if self.len >= wanted || (!self.mergeable && !self.chains.is_empty()) {
                break;
            }
            let before = self.buffers.len();
            let taken = queue.pop_one_way(self.memory, true, &mut self.buffers);
            let Some((head, len)) = taken else { break };
            if len < HEADER_LEN {
                self.buffers.truncate(before);
                queue.push(self.memory, head, 0);
                continue;
            }
            self.chains.push_back(RoomChain { head, buffers: self.buffers.len() - before, len });
            self.len += len;
        }
        if let Some(packet) = self.waiting.take() {
            self.place(queue, packet);
        }
        self.waiting.is_none() && !self.chains.is_empty()
    }

    /// Returns the buffers of the next packet: those of the chains, then the spare. They are valid
    /// until the next call of another method.
    pub(super) fn iovecs(&mut self, iovecs: &mut Vec<libc::iovec>) {
        iovecs.clear();
        iovecs.extend(self.buffers.iter().take(IOV_MAX - 1).map(|slice| iovec(slice, usize::MAX)));
        let iov_base = self.spare.as_mut_ptr().cast();
        iovecs.push(libc::iovec { iov_base, iov_len: self.spare.len() });
    }

    /// Handles a packet of `len` bytes in these buffers. The driver gets the packet, unless it
    /// needs more room, or never fits and is dropped.
    pub(super) fn filled(&mut self, queue: &mut ActiveQueue, iovecs: &[libc::iovec], len: usize) {
        let room: usize = iovecs[..iovecs.len() - 1].iter().map(|iovec| iovec.iov_len).sum();
        // The tap cuts off the rest of a longer packet.
        if len >= HEADER_LEN && len < room + self.spare.len() {
            self.place(queue, Waiting { len, placed: len.min(room) });
        }
    }

    fn place(&mut self, queue: &mut ActiveQueue, packet: Waiting) {
        if packet.len > self.len {
            let all = self.chains.len() >= usize::from(queue.size());
            // A driver whose whole ring has less room never gets such a packet.
            if self.mergeable && !all {
                self.waiting = Some(packet);
            }
            return;
        }
        if packet.placed < packet.len {
            let rest = &self.spare[..packet.len - packet.placed];
            write_at(&self.buffers, packet.placed, rest);
        }
        let (mut left, mut count, mut buffers) = (packet.len, 0u16, 0);
        while left > 0 {
            let Some(chain) = self.chains.pop_front() else { break };
            let filled = chain.len.min(left);
            queue.stage(self.memory, chain.head, filled as u32);
            left -= filled;
            count += 1;
            buffers += chain.buffers;
            self.len -= chain.len;
        }
        write_at(&self.buffers, NUM_BUFFERS, &count.to_le_bytes());
        self.buffers.drain(..buffers);
        // The driver must see all chains of a packet together.
        queue.publish(self.memory);
    }

    /// Puts all chains back into the ring. A waiting packet is lost.
    pub(super) fn give_back(self, queue: &mut ActiveQueue) {
        self.chains.iter().for_each(|_| queue.unpop());
    }
}

/// Copies `bytes` to the concatenated buffers at `offset`.
fn write_at(buffers: &[VolatileSlice<'_>], offset: usize, bytes: &[u8]) {
    let (mut offset, mut rest) = (offset, bytes);
    for slice in buffers {
        if rest.is_empty() {
            return;
        }
        if let Ok(part) = slice.offset(offset) {
            part.copy_from(rest);
            rest = &rest[part.len().min(rest.len())..];
        }
        offset = offset.saturating_sub(slice.len());
    }
}

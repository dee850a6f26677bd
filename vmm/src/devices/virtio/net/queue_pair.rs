//! A receive and a transmit queue, and the thread that moves packets between them and a tap.
//!
//! The thread sleeps until the tap has a packet or the driver kicks. Then it moves packets both
//! ways, in turns of at most [`TURN`], so that neither direction starves the other, or the stop.
//!
//! The thread waits for a tap whose send buffer is full, and the packet stays in the ring. The
//! guest's own queueing then decides what to send, drop or delay, as with a NIC whose ring is full.
//! Other packets that the tap refuses are dropped, because it would refuse them again. While the
//! driver has made no room, the tap is not read: its queue in the host's kernel fills, and drops
//! later packets.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::features::{GUEST_SEGMENTS, MRG_RXBUF};
use super::packet::{HEADER_LEN, MAX_PACKET_LEN};
use super::receive::Room;
use super::server::{PairServer, QueuePairParts};
use super::tap::Tap;
use crate::devices::virtio::chain::iovec;
use crate::devices::virtio::queue::ActiveQueue;
use crate::devices::virtio::state::QueueState;
use crate::devices::virtio::worker::{Stop, Worker};
use crate::memory::GuestMemoryMap;

/// Most packets in one direction before the other direction and the stop are checked.
const TURN: usize = 64;

/// Room for the largest packet of several segments, with its header (5.1.6.3.1).
const SEGMENTS_LEN: usize = 65562;

/// Room for a frame with its Ethernet header and two VLAN tags, without its payload.
const FRAME_OVERHEAD: usize = HEADER_LEN + 14 + 2 * 4;

const STOP: u64 = 0;
const RECEIVE_KICK: u64 = 1;
const TRANSMIT_KICK: u64 = 2;
const TAP: u64 = 3;

pub(super) struct QueuePair {
    tap: Arc<Tap>,
    memory: GuestMemoryMap,
    receive: ActiveQueue,
    transmit: ActiveQueue,
    mergeable: bool,
    /// Bytes of room that suffice for most packets.
    wanted: usize,
}

/// Results of moving packets.
#[derive(PartialEq, Eq)]
enum Moved {
    /// No packet is left.
    All,
    /// The turn is over.
    Turn,
    /// The tap must become ready first.
    TapBlocks,
}

impl QueuePair {
    pub(super) fn new(parts: QueuePairParts) -> Self {
        let QueuePairParts { tap, memory, features, mtu, queues: [receive, transmit] } = parts;
        let wanted = if features & GUEST_SEGMENTS != 0 {
            SEGMENTS_LEN
        } else {
            FRAME_OVERHEAD + usize::from(mtu.unwrap_or(1500))
        };
        let mergeable = features & MRG_RXBUF != 0;
        Self { tap, memory, receive, transmit, mergeable, wanted }
    }

    pub(super) fn queues(&self) -> [QueueState; 2] {
        [self.receive.state(), self.transmit.state()]
    }

    /// Serves until the stop.
    pub(super) fn run(&mut self, stop: &Stop) {
        if let Err(e) = self.serve(stop) {
            stop.fail(format!("a network device cannot wait for packets: epoll: {e}"));
        }
    }

    fn serve(&mut self, stop: &Stop) -> io::Result<()> {
        let epoll = Epoll::new()?;
        // A tap with packets must not wake the thread again and again while the driver has no room.
        let tap_events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for (fd, events, token) in [
            (stop.event().as_raw_fd(), EventSet::IN, STOP),
            (self.receive.kick().as_raw_fd(), EventSet::IN, RECEIVE_KICK),
            (self.transmit.kick().as_raw_fd(), EventSet::IN, TRANSMIT_KICK),
            (self.tap.as_raw_fd(), tap_events, TAP),
        ] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))?;
        }
        let memory = self.memory.clone();
        let mut room = Room::new(&memory, self.mergeable, self.wanted);
        let mut iovecs = Vec::new();
        let mut buffers = Vec::new();
        let mut events = [EpollEvent::default(); 4];
        let (mut readable, mut writable) = (true, true);
        // An earlier server may have left chains.
        let mut more = true;
        while !stop.is_given() {
            let count = match epoll.wait(if more { 0 } else { -1 }, &mut events) {
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    room.give_back(&mut self.receive);
                    return Err(e);
                }
            };
            for event in &events[..count] {
                match event.data() {
                    // Both queues are checked below after any kick.
                    RECEIVE_KICK => drop(self.receive.kick().read()),
                    TRANSMIT_KICK => drop(self.transmit.kick().read()),
                    TAP => {
                        readable |= event.event_set() != EventSet::OUT;
                        writable |= event.event_set().contains(EventSet::OUT);
                    }
                    _ => {}
                }
            }
            more = false;
            if writable {
                self.transmit.disable_kicks(&memory);
                match self.send(&memory, &mut buffers, &mut iovecs) {
                    Moved::All => more |= self.transmit.enable_kicks(&memory),
                    Moved::Turn => more = true,
                    Moved::TapBlocks => {
                        writable = false;
                        // A tap reports that it can be written only on request, and at once if it
                        // already can.
                        let tap_events = EpollEvent::new(tap_events | EventSet::OUT, TAP);
                        epoll.ctl(ControlOperation::Modify, self.tap.as_raw_fd(), tap_events)?;
                    }
                }
            }
            if readable {
                self.receive.disable_kicks(&memory);
                match self.deliver(&mut room, &mut iovecs) {
                    // The driver must make room.
                    Moved::All => more |= self.receive.enable_kicks(&memory),
                    Moved::Turn => more = true,
                    Moved::TapBlocks => readable = false,
                }
            }
        }
        room.give_back(&mut self.receive);
        Ok(())
    }

    /// Moves packets from the guest to the tap.
    fn send<'m>(
        &mut self,
        memory: &'m GuestMemoryMap,
        buffers: &mut Vec<VolatileSlice<'m>>,
        iovecs: &mut Vec<libc::iovec>,
    ) -> Moved {
        let mut moved = Moved::Turn;
        for _ in 0..TURN {
            buffers.clear();
            let Some((head, len)) = self.transmit.pop_one_way(memory, false, buffers) else {
                moved = Moved::All;
                break;
            };
            if (HEADER_LEN..=MAX_PACKET_LEN).contains(&len) {
                iovecs.clear();
                iovecs.extend(buffers.iter().map(|slice| iovec(slice, usize::MAX)));
                // SAFETY: each buffer is a checked piece of guest memory, which stays mapped while
                // `memory` lives. The guest may change it meanwhile, and then sends the changed
                // bytes. The kernel checks its own copy of the header.
                let sent = unsafe { self.tap.write(iovecs) };
                if sent.is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock) {
                    self.transmit.unpop();
                    moved = Moved::TapBlocks;
                    break;
                }
            }
            self.transmit.push(memory, head, 0);
        }
        self.transmit.signal(memory);
        moved
    }

    /// Moves packets from the tap to the guest.
    fn deliver(&mut self, room: &mut Room<'_>, iovecs: &mut Vec<libc::iovec>) -> Moved {
        let mut moved = Moved::Turn;
        for _ in 0..TURN {
            if !room.gather(&mut self.receive) {
                moved = Moved::All;
                break;
            }
            room.iovecs(iovecs);
            // SAFETY: each buffer is a checked piece of guest memory, which stays mapped while
            // `memory` lives, or the room's own spare, which nothing else uses.
            match unsafe { self.tap.read(iovecs) } {
                Ok(len) => room.filled(&mut self.receive, iovecs, len),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // A removed tap has no more packets either.
                Err(_) => {
                    moved = Moved::TapBlocks;
                    break;
                }
            }
        }
        let memory = &self.memory;
        self.receive.signal(memory);
        moved
    }
}

impl PairServer for Worker<QueuePair> {
    fn queues(&self) -> Option<[QueueState; 2]> {
        self.held().map(QueuePair::queues)
    }
}

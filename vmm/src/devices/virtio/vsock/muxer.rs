//! The muxer of a guest's streams. It assigns packets to streams, and lets streams send in turn.
//!
//! One thread owns all streams. It waits for the queues' kicks, the listener and the host sockets.
//! It never blocks on one stream.

mod guest;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{Broken, Connection};
use super::packet::Ports;
use super::state::{MuxerState, StreamState};
use crate::devices::virtio::queue::ActiveQueue;
use crate::devices::virtio::state::QueueState;
use crate::devices::virtio::worker::Stop;
use crate::memory::GuestMemoryMap;

/// Most streams at a time, in any state.
pub(crate) const MAX_CONNECTIONS: usize = 1024;

/// Most streams opened by the guest, so that a flood of them leaves room for the host's.
pub(crate) const MAX_GUEST_CONNECTIONS: usize = MAX_CONNECTIONS / 2;

/// Most resets that wait for room in the receive queue. Above that, the guest's packets wait too.
/// Streams that the host ends add at most one reset each.
const MAX_RESETS: usize = 256;

/// First host port of streams that the host opens, above the ports of services.
const FIRST_HOST_PORT: u32 = 1 << 30;

const STOP: u64 = 0;
const RECEIVE_KICK: u64 = 1;
const TRANSMIT_KICK: u64 = 2;
const LISTENER: u64 = 3;
const FIRST_CONNECTION: u64 = 16;

/// The sockets that outlive a reset of the device.
pub(super) struct HostSide {
    pub(super) listener: UnixListener,
    pub(super) connector: UnixDatagram,
    pub(super) bytes: Arc<StreamBytes>,
}

/// Bytes of data in the packets of all streams since the start. The worker adds, and the main thread
/// reads.
#[derive(Debug, Default)]
pub struct StreamBytes {
    /// Bytes from the host to the guest.
    pub to_guest: AtomicU64,
    /// Bytes from the guest to the host.
    pub to_host: AtomicU64,
}

pub(super) struct Muxer {
    guest_cid: u64,
    host: Arc<HostSide>,
    memory: GuestMemoryMap,
    receive: ActiveQueue,
    transmit: ActiveQueue,
    epoll: Epoll,
    connections: HashMap<u64, Connection>,
    by_ports: HashMap<Ports, u64>,
    /// Streams with a packet for the guest, in turn.
    senders: VecDeque<u64>,
    resets: VecDeque<Ports>,
    next_id: u64,
    next_host_port: u32,
    opened_by_guest: usize,
    /// True if a client could not be accepted for want of descriptors.
    accept_failed: bool,
}

impl Muxer {
    pub(super) fn new(
        guest_cid: u64,
        host: Arc<HostSide>,
        memory: GuestMemoryMap,
        receive: ActiveQueue,
        transmit: ActiveQueue,
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        for (fd, token) in [
            (receive.kick().as_raw_fd(), RECEIVE_KICK),
            (transmit.kick().as_raw_fd(), TRANSMIT_KICK),
        ] {
            add(&epoll, fd, EventSet::IN, token)?;
        }
        // A client that cannot be accepted must not wake the thread again and again.
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        add(&epoll, host.listener.as_raw_fd(), edge, LISTENER)?;
        Ok(Self {
            guest_cid,
            host,
            memory,
            receive,
            transmit,
            epoll,
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            senders: VecDeque::new(),
            resets: VecDeque::new(),
            next_id: FIRST_CONNECTION,
            next_host_port: FIRST_HOST_PORT,
            opened_by_guest: 0,
            accept_failed: false,
        })
    }

    /// Returns the state of receive and transmit queue.
    pub(super) fn queues(&self) -> [QueueState; 2] {
        [self.receive.state(), self.transmit.state()]
    }

    /// Returns the state of all streams, without their sockets.
    pub(super) fn state(&self) -> MuxerState {
        let mut connections: Vec<_> = self.connections.iter().collect();
        connections.sort_unstable_by_key(|(id, _)| **id);
        MuxerState {
            connections: connections.into_iter().map(|(_, stream)| stream.state()).collect(),
            resets: self.resets.iter().map(|ports| (ports.host, ports.guest)).collect(),
            next_host_port: self.next_host_port,
        }
    }

    /// Serves until the stop.
    pub(super) fn run(&mut self, stop: &Stop) {
        if let Err(e) = add(&self.epoll, stop.event().as_raw_fd(), EventSet::IN, STOP) {
            return stop.fail(format!("the socket device cannot wait for its stop: epoll: {e}"));
        }
        let mut events = [EpollEvent::default(); 64];
        // An earlier worker may have left packets.
        let mut more = true;
        while !stop.is_given() {
            // While packets are left, the sockets are only polled.
            let count = match self.epoll.wait(if more { 0 } else { -1 }, &mut events) {
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    return stop.fail(format!("the socket device cannot wait: epoll: {e}"));
                }
            };
            for event in &events[..count] {
                match event.data() {
                    STOP => return,
                    // Both queues are checked below after any kick.
                    RECEIVE_KICK => drop(self.receive.kick().read()),
                    TRANSMIT_KICK => drop(self.transmit.kick().read()),
                    LISTENER => self.accept(),
                    id => self.on_host_socket(id, event.event_set()),
                }
            }
            if self.accept_failed {
                self.accept();
            }
            more = self.move_packets();
        }
    }

    /// Moves a turn of packets both ways. True if more can be moved.
    fn move_packets(&mut self) -> bool {
        self.transmit.disable_kicks(&self.memory);
        self.receive.disable_kicks(&self.memory);
        self.take_from_guest();
        self.give_to_guest();
        // Enabling kicks reports if a chain is left. A transmit chain that waits because the list
        // of resets is full is taken up after a receive kick. New receive buffers matter only while
        // packets wait for them.
        let transmit = self.transmit.enable_kicks(&self.memory) && self.has_room_for_resets();
        let receive = self.wants_to_send() && self.receive.enable_kicks(&self.memory);
        transmit || receive
    }

    fn has_room_for_resets(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    fn wants_to_send(&self) -> bool {
        !self.resets.is_empty() || !self.senders.is_empty()
    }

    // ---- from the host ----

    fn accept(&mut self) {
        loop {
            let stream = match self.host.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    self.accept_failed = e.kind() != io::ErrorKind::WouldBlock;
                    return;
                }
            };
            // A stream above the bound is closed, which its peer sees as a refusal.
            if self.connections.len() < MAX_CONNECTIONS && stream.set_nonblocking(true).is_ok() {
                // The client's line sets the ports later.
                let ports = Ports { host: 0, guest: 0 };
                let connection = Connection::new(stream, ports, StreamState::Handshake);
                if let Some(id) = self.insert(connection) {
                    // The line may have come before the epoll watched the socket.
                    self.on_host_socket(id, EventSet::empty());
                }
            }
        }
    }

    /// Returns unused ports for a stream to this port of the guest. There are far fewer streams
    /// than host ports, so the search is short.
    fn unused_ports(&mut self, guest: u32) -> Ports {
        loop {
            let ports = Ports { host: self.next_host_port, guest };
            // The last number means any port (VMADDR_PORT_ANY).
            self.next_host_port = match self.next_host_port + 1 {
                u32::MAX => FIRST_HOST_PORT,
                next => next,
            };
            if !self.by_ports.contains_key(&ports) {
                return ports;
            }
        }
    }

    fn insert(&mut self, connection: Connection) -> Option<u64> {
        let id = self.next_id;
        let events =
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        add(&self.epoll, connection.socket().as_raw_fd(), events, id).ok()?;
        self.next_id += 1;
        self.opened_by_guest += usize::from(connection.opened_by_guest);
        self.connections.insert(id, connection);
        Some(id)
    }

    fn remove(&mut self, id: u64) {
        if let Some(connection) = self.connections.remove(&id) {
            self.opened_by_guest -= usize::from(connection.opened_by_guest);
            if connection.listed {
                self.senders.retain(|listed| *listed != id);
            }
        }
    }

    fn on_host_socket(&mut self, id: u64, events: EventSet) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let hung_up = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        let outcome = match connection.state {
            StreamState::Handshake => match connection.read_connect_line() {
                _ if hung_up => Err(Broken),
                Ok(Some(port)) => {
                    self.request(id, port);
                    Ok(())
                }
                Ok(None) => Ok(()),
                Err(broken) => Err(broken),
            },
            // The peer closed before the guest's answer.
            StreamState::Requested if hung_up => Err(Broken),
            StreamState::Requested | StreamState::Open | StreamState::Draining => {
                connection.set_readable(hung_up);
                connection.flush();
                Ok(())
            }
        };
        self.settle(id, outcome);
    }

    /// Requests a stream to a port of the guest, for a client of the host.
    fn request(&mut self, id: u64, port: u32) {
        let ports = self.unused_ports(port);
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.ports = ports;
            connection.state = StreamState::Requested;
            connection.announce.request = true;
            self.by_ports.insert(ports, id);
        }
    }

    /// Ends a stream, once the guest's data has reached the host.
    fn drain(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.drain();
        if !connection.has_backlog() {
            self.remove(id);
        }
    }

    // ---- bookkeeping ----

    /// Ends a connection, lists it among the senders, or does nothing. Called after each change of
    /// it.
    fn settle(&mut self, id: u64, outcome: Result<(), Broken>) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        match connection.state {
            StreamState::Handshake | StreamState::Draining => {
                if outcome.is_err()
                    || (connection.state == StreamState::Draining && !connection.has_backlog())
                {
                    self.remove(id);
                }
                return;
            }
            StreamState::Requested | StreamState::Open => {}
        }
        if outcome.is_err() || connection.is_finished() {
            let ports = connection.ports;
            // A guest that was not asked yet needs no reset. So host processes that come and go
            // leave nothing behind while the guest gives no buffers.
            let unasked = connection.state == StreamState::Requested && connection.announce.request;
            self.by_ports.remove(&ports);
            match outcome {
                Ok(()) => self.drain(id),
                Err(Broken) => self.remove(id),
            }
            if !unasked {
                self.reset(ports);
            }
            return;
        }
        if !connection.listed && connection.wants_to_send() {
            connection.listed = true;
            self.senders.push_back(id);
        }
    }

    fn reset(&mut self, ports: Ports) {
        self.resets.push_back(ports);
    }
}

fn add(epoll: &Epoll, fd: RawFd, events: EventSet, token: u64) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
}

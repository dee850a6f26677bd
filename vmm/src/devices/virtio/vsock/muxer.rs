//! All streams of a guest: which packet belongs to which, and who has something to send.
//!
//! One thread owns everything here. It waits for the queues' kicks, the listener and the host
//! sockets, moves what can be moved, and never blocks on one stream.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::Arc;

use virtio_vsock::packet::VsockPacket;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::HOST_CID;
use super::connection::{BUF_ALLOC, Broken, Connection, State};
use super::packet::{MAX_DATA_LEN, Op, Ports, TYPE_STREAM};
use crate::devices::virtio::ActiveQueue;
use crate::memory::GuestMemoryMap;

/// Most streams at a time, in whatever state.
const MAX_CONNECTIONS: usize = 1024;

/// Most resets that wait for room in the receive queue. Beyond it the guest's packets wait too.
const MAX_RESETS: usize = 256;

/// Host ports of streams that the host opens; above what services use.
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
    /// Connections that have something for the guest, in turn.
    senders: VecDeque<u64>,
    resets: VecDeque<Ports>,
    next_id: u64,
    next_host_port: u32,
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
            (host.listener.as_raw_fd(), LISTENER),
        ] {
            add(&epoll, fd, EventSet::IN, token)?;
        }
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
        })
    }

    /// Serves until `stop` becomes readable.
    pub(super) fn run(&mut self, stop: &EventFd) {
        if add(&self.epoll, stop.as_raw_fd(), EventSet::IN, STOP).is_err() {
            return;
        }
        let mut events = [EpollEvent::default(); 64];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            for event in &events[..count] {
                match event.data() {
                    STOP => return,
                    // Both queues are looked at below, whoever kicked.
                    RECEIVE_KICK => drop(self.receive.kick().read()),
                    TRANSMIT_KICK => drop(self.transmit.kick().read()),
                    LISTENER => self.accept(),
                    id => self.on_host_socket(id, event.event_set()),
                }
            }
            self.move_packets();
        }
    }

    /// Moves packets both ways until neither direction gets on.
    fn move_packets(&mut self) {
        loop {
            self.transmit.disable_kicks(&self.memory);
            self.receive.disable_kicks(&self.memory);
            self.take_from_guest();
            self.give_to_guest();
            // Kicks asked for again tell whether a chain slipped in between. A transmit chain that
            // waits because the list of resets is full is taken up again by a receive kick; and
            // new receive buffers are of interest only when something waits for them.
            let transmit = self.transmit.enable_kicks(&self.memory) && self.has_room_for_resets();
            let receive = self.wants_to_send() && self.receive.enable_kicks(&self.memory);
            if !transmit && !receive {
                return;
            }
        }
    }

    fn has_room_for_resets(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    fn wants_to_send(&self) -> bool {
        !self.resets.is_empty() || !self.senders.is_empty()
    }

    // ---- from the host ----

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.host.listener.accept() {
            // One stream too many is closed, which its peer sees as a refusal.
            if self.connections.len() < MAX_CONNECTIONS && stream.set_nonblocking(true).is_ok() {
                let ports = Ports { host: self.unused_host_port(), guest: 0 };
                let id = self.insert(Connection::new(stream, ports, State::Handshake));
                // The line may have come with the connection, before the epoll knew of it.
                self.on_host_socket(id, EventSet::empty());
            }
        }
    }

    fn unused_host_port(&mut self) -> u32 {
        let port = self.next_host_port;
        self.next_host_port = port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
        port
    }

    fn insert(&mut self, connection: Connection) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        let events =
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        if add(&self.epoll, connection.stream().as_raw_fd(), events, id).is_ok() {
            self.connections.insert(id, connection);
        }
        id
    }

    fn on_host_socket(&mut self, id: u64, events: EventSet) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let hung_up = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        let outcome = match connection.state {
            State::Handshake => match connection.read_connect_line() {
                Ok(Some(port)) => {
                    connection.ports.guest = port;
                    connection.state = State::Requested;
                    connection.announce.request = true;
                    let ports = connection.ports;
                    self.by_ports.insert(ports, id);
                    Ok(())
                }
                Ok(None) if hung_up => Err(Broken),
                Ok(None) => Ok(()),
                Err(broken) => Err(broken),
            },
            // The peer went away before the guest answered.
            State::Requested if hung_up => Err(Broken),
            State::Requested | State::Open | State::Draining => {
                connection.set_readable(hung_up);
                if events.contains(EventSet::OUT) { connection.flush() } else { Ok(()) }
            }
        };
        self.settle(id, outcome);
    }

    // ---- from the guest ----

    fn take_from_guest(&mut self) {
        let memory = self.memory.clone();
        let mut used = false;
        while self.has_room_for_resets()
            && let Some(mut chain) = self.transmit.pop_raw(&memory)
        {
            let head = chain.head_index();
            // A packet that is not one is dropped; there is nobody to answer.
            if let Ok(packet) = VsockPacket::from_tx_virtq_chain(&memory, &mut chain, MAX_DATA_LEN)
            {
                self.on_packet(&packet);
            }
            self.transmit.push(&memory, head, 0);
            used = true;
        }
        if used {
            self.transmit.signal(&memory);
        }
    }

    fn on_packet(&mut self, packet: &VsockPacket<'_, ()>) {
        let ports = Ports::of_sent(packet);
        if packet.src_cid() != self.guest_cid || packet.dst_cid() != HOST_CID {
            return;
        }
        let op = Op::from_raw(packet.op());
        if packet.type_() != TYPE_STREAM {
            // Not of a kind that is served here (5.10.6.4.1), but a reset is never answered.
            return if op != Some(Op::Reset) {
                self.reset(ports)
            };
        }
        let Some(id) = self.by_ports.get(&ports).copied() else {
            return match op {
                Some(Op::Request) => self.on_request(ports, packet.buf_alloc(), packet.fwd_cnt()),
                Some(Op::Reset) => {}
                _ => self.reset(ports),
            };
        };
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.update_credit(packet.buf_alloc(), packet.fwd_cnt());
        let outcome = match (op, connection.state) {
            (Some(Op::Response), State::Requested) => connection.open(),
            (Some(Op::Reset), _) => return self.on_reset(id),
            (Some(Op::Data), State::Open) => match packet.data_slice() {
                Some(data) => connection.receive(data),
                None => Ok(()),
            },
            (Some(Op::Shutdown), State::Open) => {
                connection.guest_shutdown(packet.flags());
                Ok(())
            }
            (Some(Op::CreditUpdate), State::Open) => Ok(()),
            (Some(Op::CreditRequest), State::Open) => {
                connection.announce.credit = true;
                Ok(())
            }
            _ => Err(Broken),
        };
        self.settle(id, outcome);
    }

    /// The guest wants a stream to a host port: the sandbox process gets the other end.
    fn on_request(&mut self, ports: Ports, buf_alloc: u32, fwd_cnt: u32) {
        let connected = (self.connections.len() < MAX_CONNECTIONS)
            .then(|| self.offer_to_host(ports.host).ok())
            .flatten();
        let Some(stream) = connected else { return self.reset(ports) };
        let mut connection = Connection::new(stream, ports, State::Open);
        connection.update_credit(buf_alloc, fwd_cnt);
        connection.announce.response = true;
        let id = self.insert(connection);
        self.by_ports.insert(ports, id);
        self.settle(id, Ok(()));
    }

    fn offer_to_host(&self, port: u32) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        self.host
            .connector
            .send_with_fd(&port.to_le_bytes()[..], theirs.as_raw_fd())
            .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        Ok(ours)
    }

    fn on_reset(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        self.by_ports.remove(&connection.ports);
        connection.drain();
        if !connection.has_backlog() {
            self.connections.remove(&id);
        }
    }

    // ---- bookkeeping ----

    /// After anything happened to a connection: ends it, lists it, or leaves it be.
    fn settle(&mut self, id: u64, outcome: Result<(), Broken>) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        match connection.state {
            State::Handshake | State::Draining => {
                if outcome.is_err()
                    || (connection.state == State::Draining && !connection.has_backlog())
                {
                    self.connections.remove(&id);
                }
                return;
            }
            State::Requested | State::Open => {}
        }
        if outcome.is_err() || connection.is_finished() {
            let ports = connection.ports;
            self.connections.remove(&id);
            self.by_ports.remove(&ports);
            return self.reset(ports);
        }
        if !connection.listed && connection.wants_to_send() {
            connection.listed = true;
            self.senders.push_back(id);
        }
    }

    fn reset(&mut self, ports: Ports) {
        self.resets.push_back(ports);
    }

    // ---- to the guest ----

    fn give_to_guest(&mut self) {
        let memory = self.memory.clone();
        let mut used = false;
        while self.wants_to_send()
            && let Some(mut chain) = self.receive.pop_raw(&memory)
        {
            let head = chain.head_index();
            match VsockPacket::from_rx_virtq_chain(&memory, &mut chain, MAX_DATA_LEN) {
                Ok(mut packet) => match self.next_packet(&mut packet) {
                    Some(len) => self.receive.push(&memory, head, len),
                    None => {
                        self.receive.unpop();
                        break;
                    }
                },
                // A buffer too small for a header goes back empty.
                Err(_) => self.receive.push(&memory, head, 0),
            }
            used = true;
        }
        if used {
            self.receive.signal(&memory);
        }
    }

    /// Makes the next packet for the guest. Returns its length with the header, or `None` when
    /// nothing is left to say.
    fn next_packet(&mut self, packet: &mut VsockPacket<'_, ()>) -> Option<u32> {
        if let Some(ports) = self.resets.pop_front() {
            return Some(self.fill(packet, ports, Op::Reset, 0, 0));
        }
        while let Some(id) = self.senders.front().copied() {
            let Some(connection) = self.connections.get_mut(&id) else {
                self.senders.pop_front();
                continue;
            };
            let (ports, announce) = (connection.ports, connection.announce);
            let made = if announce.request {
                connection.announce.request = false;
                Ok(Some((Op::Request, 0, 0)))
            } else if announce.response {
                connection.announce.response = false;
                Ok(Some((Op::Response, 0, 0)))
            } else if connection.state == State::Open {
                next_of_open(connection, packet)
            } else {
                Ok(None)
            };
            match made {
                Ok(Some((op, len, flags))) => {
                    let fwd_cnt = connection.announce_forwarded();
                    // Streams take turns.
                    self.senders.rotate_left(1);
                    let total = self.fill(packet, ports, op, len, flags);
                    packet.set_fwd_cnt(fwd_cnt);
                    return Some(total);
                }
                outcome => {
                    self.senders.pop_front();
                    connection.listed = false;
                    self.settle(id, outcome.map(|_| ()));
                    if let Some(ports) = self.resets.pop_front() {
                        return Some(self.fill(packet, ports, Op::Reset, 0, 0));
                    }
                }
            }
        }
        None
    }

    fn fill(
        &self,
        packet: &mut VsockPacket<'_, ()>,
        ports: Ports,
        op: Op,
        len: u32,
        flags: u32,
    ) -> u32 {
        packet
            .set_src_cid(HOST_CID)
            .set_dst_cid(self.guest_cid)
            .set_src_port(ports.host)
            .set_dst_port(ports.guest)
            .set_len(len)
            .set_type(TYPE_STREAM)
            .set_op(op as u16)
            .set_flags(flags)
            .set_buf_alloc(BUF_ALLOC)
            .set_fwd_cnt(0);
        virtio_vsock::packet::PKT_HEADER_SIZE as u32 + len
    }
}

/// Data, a credit update, or a shutdown: operation, length of the data, flags.
fn next_of_open(
    connection: &mut Connection,
    packet: &VsockPacket<'_, ()>,
) -> Result<Option<(Op, u32, u32)>, Broken> {
    if let Some(room) = packet.data_slice() {
        let len = connection.read_for_guest(room)?;
        if len > 0 {
            return Ok(Some((Op::Data, len, 0)));
        }
    }
    if connection.announce.credit {
        return Ok(Some((Op::CreditUpdate, 0, 0)));
    }
    match connection.untold_shutdown() {
        0 => Ok(None),
        flags => {
            connection.set_told(flags);
            Ok(Some((Op::Shutdown, 0, flags)))
        }
    }
}

fn add(epoll: &Epoll, fd: RawFd, events: EventSet, token: u64) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
}

//! The muxer's queues: packets from the guest and to the guest.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::{MAX_CONNECTIONS, MAX_GUEST_CONNECTIONS, Muxer};
use crate::devices::virtio::chain::Buffers;
use crate::devices::virtio::vsock::connection::{BUF_ALLOC, Broken, Connection};
use crate::devices::virtio::vsock::packet::{
    self, HEADER_LEN, HOST_CID, Header, Op, Ports, TYPE_STREAM,
};
use crate::devices::virtio::vsock::state::StreamState;

/// Most packets in one direction before the sockets and the stop are checked again.
const TURN: usize = 256;

impl Muxer {
    pub(super) fn take_from_guest(&mut self) {
        let memory = self.memory.clone();
        let mut used = false;
        for _ in 0..TURN {
            if !self.has_room_for_resets() {
                break;
            }
            let Some(mut chain) = self.transmit.pop(&memory) else { break };
            // Data that is not a packet is dropped: it names no port to answer.
            if let Some((header, data)) = packet::parse(&mut chain.readable) {
                self.on_packet(&header, data);
            }
            self.transmit.push(&memory, chain.head, 0);
            used = true;
        }
        if used {
            self.transmit.signal(&memory);
        }
    }

    fn on_packet(&mut self, header: &Header, data: Buffers<'_>) {
        let ports = Ports::of_sent(header);
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return;
        }
        let op = Op::from_raw(header.op);
        if header.kind != TYPE_STREAM {
            // A socket type that is not served gets a reset (5.10.6.4.1), but a reset is never
            // answered.
            return if op != Some(Op::Reset) {
                self.reset(ports)
            };
        }
        let Some(id) = self.by_ports.get(&ports).copied() else {
            return match op {
                Some(Op::Request) => self.on_request(ports, header),
                Some(Op::Reset) => {}
                _ => self.reset(ports),
            };
        };
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.update_credit(header.buf_alloc, header.fwd_cnt);
        let outcome = match (op, connection.state) {
            (Some(Op::Response), StreamState::Requested) if !connection.announce.request => {
                connection.open()
            }
            (Some(Op::Reset), _) => return self.on_reset(id),
            (Some(Op::Data), StreamState::Open) => {
                self.host.bytes.to_host.fetch_add(data.len() as u64, Ordering::Relaxed);
                connection.receive(data)
            }
            (Some(Op::Shutdown), StreamState::Open) => {
                connection.guest_shutdown(header.flags);
                Ok(())
            }
            (Some(Op::CreditUpdate), StreamState::Open) => Ok(()),
            (Some(Op::CreditRequest), StreamState::Open) => {
                connection.announce.credit = true;
                Ok(())
            }
            _ => Err(Broken),
        };
        self.settle(id, outcome);
    }

    /// Opens a stream from the guest to a host port. The sandbox process gets the other end.
    fn on_request(&mut self, ports: Ports, header: &Header) {
        let room = self.connections.len() < MAX_CONNECTIONS
            && self.opened_by_guest < MAX_GUEST_CONNECTIONS;
        let stream = room.then(|| self.offer_to_host(ports.host).ok()).flatten();
        let id = stream.and_then(|stream| {
            let mut connection = Connection::new(stream, ports, StreamState::Open);
            connection.update_credit(header.buf_alloc, header.fwd_cnt);
            connection.announce.response = true;
            self.insert(connection)
        });
        let Some(id) = id else { return self.reset(ports) };
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
        let ports = connection.ports;
        self.by_ports.remove(&ports);
        self.drain(id);
    }

    pub(super) fn give_to_guest(&mut self) {
        let memory = self.memory.clone();
        let mut used = false;
        for _ in 0..TURN {
            if !self.wants_to_send() {
                break;
            }
            let Some(mut chain) = self.receive.pop(&memory) else { break };
            let head = chain.head;
            // A buffer without room for a header and some data goes back empty. Without room for
            // data, a stream with nothing but data would be asked again and again.
            let len = match chain.writable.split_to(HEADER_LEN) {
                Some(mut room) if !chain.writable.is_empty() => {
                    let Some(header) = self.next_packet(&chain.writable) else {
                        self.receive.unpop();
                        break;
                    };
                    self.host.bytes.to_guest.fetch_add(header.len.into(), Ordering::Relaxed);
                    room.put(&header.to_bytes()).map_or(0, |()| HEADER_LEN as u32 + header.len)
                }
                _ => 0,
            };
            self.receive.push(&memory, head, len);
            used = true;
        }
        if used {
            self.receive.signal(&memory);
        }
    }

    /// Makes the next packet for the guest, with its data in `room`. `None` if no stream has a
    /// packet. Each listed stream is asked at most once.
    fn next_packet(&mut self, room: &Buffers<'_>) -> Option<Header> {
        let mut unasked = self.senders.len();
        loop {
            if let Some(ports) = self.resets.pop_front() {
                return Some(self.header(ports, Op::Reset));
            }
            unasked = unasked.checked_sub(1)?;
            let id = *self.senders.front()?;
            let Some(connection) = self.connections.get_mut(&id) else {
                self.senders.pop_front();
                continue;
            };
            let ports = connection.ports;
            match next_of(connection, room) {
                Ok(Some((op, len, flags))) => {
                    let fwd_cnt = connection.announce_forwarded();
                    // Streams take turns.
                    self.senders.rotate_left(1);
                    // The guest may have waited for just this shutdown.
                    self.settle(id, Ok(()));
                    return Some(Header { len, flags, fwd_cnt, ..self.header(ports, op) });
                }
                outcome => {
                    self.senders.pop_front();
                    connection.listed = false;
                    self.settle(id, outcome.map(|_| ()));
                }
            }
        }
    }

    fn header(&self, ports: Ports, op: Op) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            kind: TYPE_STREAM,
            op: op as u16,
            buf_alloc: BUF_ALLOC,
            ..Header::default()
        }
    }
}

/// Returns the next packet of a connection: operation, length of the data, flags.
fn next_of(
    connection: &mut Connection,
    room: &Buffers<'_>,
) -> Result<Option<(Op, u32, u32)>, Broken> {
    let announce = &mut connection.announce;
    if std::mem::take(&mut announce.request) {
        return Ok(Some((Op::Request, 0, 0)));
    }
    if std::mem::take(&mut announce.response) {
        return Ok(Some((Op::Response, 0, 0)));
    }
    if connection.state != StreamState::Open {
        return Ok(None);
    }
    let len = connection.read_for_guest(room)?;
    if len > 0 {
        return Ok(Some((Op::Data, len, 0)));
    }
    if connection.announce.credit {
        return Ok(Some((Op::CreditUpdate, 0, 0)));
    }
    match connection.take_shutdown() {
        0 => Ok(None),
        flags => Ok(Some((Op::Shutdown, 0, flags))),
    }
}

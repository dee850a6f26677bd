//! Tests of both directions together, and the sockets and guest buffers for tests of each.

use std::io::Write as _;

use virtio_queue::{Queue, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::devices::virtio::chain::Chain;
use crate::memory::GuestMemoryMap;

const RING: u64 = 0x1000;
const BUFFER: u64 = 0x2000;
const WRITE: u16 = 2;

/// Returns the stream's end of a host socket, and the end of the host's process.
pub(super) fn sockets() -> (UnixStream, UnixStream) {
    let (ours, host) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    (ours, host)
}

/// A buffer in guest memory.
pub(super) struct GuestBuffer {
    memory: GuestMemoryMap,
    len: u32,
}

impl GuestBuffer {
    pub(super) fn holding(data: &[u8]) -> Self {
        // Memory ends behind the buffer, so an empty one lies inside too.
        let ranges = [(GuestAddress(0), BUFFER as usize + data.len() + 1)];
        let memory = GuestMemoryMap::from_ranges(&ranges).unwrap();
        memory.write_slice(data, GuestAddress(BUFFER)).unwrap();
        Self { memory, len: data.len() as u32 }
    }

    /// Offers the buffer in a queue of one, and takes the chain from there.
    pub(super) fn chain(&self, writable: bool) -> Chain<'_> {
        let flags = if writable { WRITE } else { 0 };
        self.memory.write_obj(BUFFER, GuestAddress(0)).unwrap();
        self.memory.write_obj(self.len, GuestAddress(8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(12)).unwrap();
        self.memory.write_obj(1u16, GuestAddress(RING + 2)).unwrap();
        let mut queue = Queue::new(1).unwrap();
        queue.try_set_desc_table_address(GuestAddress(0)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(RING)).unwrap();
        queue.set_ready(true);
        let descriptors = queue.pop_descriptor_chain(&self.memory).unwrap();
        Chain::new(&self.memory, descriptors, 1).unwrap()
    }
}

/// Returns an open stream with room for 1000 bytes in the guest, and the host's end of its socket.
fn open() -> (Connection, UnixStream) {
    let (ours, host) = sockets();
    let mut connection = Connection::new(ours, Ports { host: 77, guest: 5000 }, StreamState::Open);
    connection.update_credit(1000, 0);
    (connection, host)
}

fn send(connection: &mut Connection, len: usize) {
    let buffer = GuestBuffer::holding(&vec![1; len]);
    connection.receive(buffer.chain(false).readable).unwrap();
}

fn read(connection: &mut Connection) -> u32 {
    let buffer = GuestBuffer::holding(&[0; 100]);
    connection.read_for_guest(&buffer.chain(true).writable).unwrap()
}

/// Sends until the host socket is full.
fn make_backlog(connection: &mut Connection) {
    while !connection.has_backlog() {
        send(connection, 4096);
    }
}

#[test]
fn a_host_that_hung_up_ends_both_directions_in_one_shutdown() {
    let (mut connection, host) = open();
    drop(host);
    connection.set_readable(true);
    connection.flush();
    assert_eq!(read(&mut connection), 0);
    assert!(connection.wants_to_send());
    assert_eq!(connection.take_shutdown(), SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    assert_eq!((connection.wants_to_send(), connection.take_shutdown()), (false, 0));
    assert_eq!(connection.state().told, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    assert!(!connection.is_finished());
}

#[test]
fn a_hang_up_is_told_before_the_hosts_last_data_and_its_end_after() {
    let (mut connection, mut host) = open();
    host.write_all(b"last").unwrap();
    drop(host);
    connection.set_readable(true);
    assert_eq!(connection.take_shutdown(), SHUTDOWN_RECEIVE);
    assert_eq!((read(&mut connection), read(&mut connection)), (4, 0));
    assert_eq!(connection.take_shutdown(), SHUTDOWN_SEND);
}

#[test]
fn a_stream_is_finished_when_the_guest_expects_nothing_and_sends_nothing() {
    for flags in [0, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, SHUTDOWN_SEND | SHUTDOWN_RECEIVE] {
        for host_ends in [false, true] {
            let (mut connection, host) = open();
            if host_ends {
                drop(host);
                connection.set_readable(false);
                assert_eq!(read(&mut connection), 0);
                connection.take_shutdown();
            }
            // Flags stay set, whatever the next shutdown says (5.10.6.5).
            for flag in [SHUTDOWN_SEND, SHUTDOWN_RECEIVE, 0] {
                connection.guest_shutdown(flags & flag);
            }
            let receives = flags & SHUTDOWN_RECEIVE == 0 && !host_ends;
            let sends = flags & SHUTDOWN_SEND == 0;
            assert_eq!(connection.is_finished(), !receives && !sends, "{flags} {host_ends}");
        }
    }
}

#[test]
fn a_stream_is_finished_and_drains_while_the_host_has_a_backlog_to_read() {
    let (mut connection, _host) = open();
    make_backlog(&mut connection);
    connection.guest_shutdown(SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    assert!(connection.is_finished() && connection.has_backlog());
    connection.drain();
    assert_eq!((connection.state, connection.wants_to_send()), (StreamState::Draining, false));
    let state = connection.state();
    assert!(state.guest_send_closed && !state.host_write_shut);
}

#[test]
fn freed_room_is_announced_until_a_packet_tells_it() {
    let (mut connection, host) = open();
    make_backlog(&mut connection);
    let forwarded = connection.announce_forwarded();
    drop(host);
    connection.set_readable(true);
    connection.flush();
    assert!(!connection.announce.credit);
    for _ in 0..16 {
        send(&mut connection, 4096);
    }
    assert!(connection.announce.credit && connection.wants_to_send());
    assert!(connection.announce_forwarded() >= forwarded + 16 * 4096);
    assert!(!connection.announce.credit);
}

#[test]
fn every_step_of_both_directions_is_written_down() {
    let (mut connection, mut host) = open();
    host.write_all(b"data").unwrap();
    connection.set_readable(false);
    read(&mut connection);
    make_backlog(&mut connection);
    let state = connection.state();
    assert_eq!((state.sent, state.peer_buf_alloc, state.peer_forwarded), (4, 1000, 0));
    assert_eq!(state.backlog.len() as u32, state.received - state.forwarded);
    assert!(!state.guest_send_closed && !state.guest_receive_closed);
    connection.guest_shutdown(SHUTDOWN_SEND);
    let state = connection.state();
    assert_eq!((state.guest_send_closed, state.host_write_shut), (true, false));
    drop(host);
    connection.set_readable(true);
    connection.flush();
    let state = connection.state();
    assert_eq!((state.host_write_shut, state.host_receive_closed), (true, true));
    assert_eq!((state.received, state.backlog), (state.forwarded, vec![]));
    assert_eq!((state.host_eof, state.told), (false, 0));
    connection.take_shutdown();
    assert_eq!(connection.state().told, SHUTDOWN_RECEIVE);
    connection.guest_shutdown(SHUTDOWN_RECEIVE);
    assert!(connection.state().guest_receive_closed);
}

#[test]
fn a_stream_that_the_guest_has_reset_says_nothing_more() {
    let (mut connection, _host) = open();
    connection.announce = Announce { request: false, response: true, credit: true };
    assert!(connection.wants_to_send());
    connection.drain();
    let Announce { request, response, credit } = connection.announce;
    assert!(!request && !response && !credit && !connection.wants_to_send());
}

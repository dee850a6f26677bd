//! Tests of a guest that breaks rules: it harms only its own streams.

use std::io::{Read, Write};

use super::super::driver::count;
use super::guest::{HEADER_LEN, Header, Op, TRANSMIT, VsockGuest};
use crate::devices::virtio::vsock::muxer::MAX_GUEST_CONNECTIONS;

const AT: u64 = 0x60_0000;

fn still_serves(guest: &mut VsockGuest) {
    let (mut client, port) = guest.open_from_host(4000);
    guest.send_packet(guest.header(4000, port, Op::Data), b"alive");
    let mut got = [0; 5];
    client.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"alive");
    guest.shut_down(4000, port, 3);
    guest.until(Op::Reset, 4000);
}

#[test]
fn more_than_the_credit_resets_the_stream() {
    let mut guest = VsockGuest::new();
    let _host = guest.open_from_guest(5000, 77);
    loop {
        guest.send_packet(guest.header(5000, 77, Op::Data), &vec![0; 65536]);
        if let Some((header, _)) = guest.try_receive()
            && Op::from_raw(header.op) == Some(Op::Reset)
        {
            break;
        }
    }
    still_serves(&mut guest);
}

#[test]
fn a_lie_about_its_own_credit_starves_the_guest_only() {
    let mut guest = VsockGuest::new();
    let (mut client, port) = guest.open_from_host(1024);
    guest.fwd_cnt = u32::MAX;
    guest.buf_alloc = u32::MAX;
    guest.send(1024, port, Op::CreditUpdate);
    client.write_all(&[1; 100]).unwrap();
    guest.fwd_cnt = 1;
    guest.buf_alloc = 0;
    guest.send(1024, port, Op::CreditUpdate);
    guest.fwd_cnt = 0;
    guest.buf_alloc = 100_000;
    guest.send(1024, port, Op::CreditUpdate);
    assert_eq!(guest.receive().1, [1; 100]);
}

#[test]
fn packets_out_of_place_are_answered_with_a_reset_or_not_at_all() {
    let mut guest = VsockGuest::new();
    for op in [Op::Response, Op::Shutdown, Op::Data, Op::CreditUpdate, Op::CreditRequest] {
        guest.send(1, 2, op);
        let reset = guest.expect(Op::Reset);
        assert_eq!((reset.src_port, reset.dst_port), (2, 1));
    }
    // A reset of an unknown stream is not answered. Packets from or to another cid are not either.
    guest.send(1, 2, Op::Reset);
    let request = guest.header(1, 2, Op::Request);
    guest.send_packet(Header { src_cid: 4, ..request }, &[]);
    guest.send_packet(Header { src_cid: u64::MAX, ..request }, &[]);
    guest.send_packet(Header { dst_cid: 1, ..request }, &[]);
    guest.send_packet(Header { kind: 2, op: Op::Reset as u16, ..request }, &[]);
    guest.send_packet(Header { kind: 2, dst_port: 3, ..request }, &[]);
    assert_eq!(guest.expect(Op::Reset).src_port, 3);
    guest.send_packet(Header { op: 99, dst_port: 4, ..request }, &[]);
    assert_eq!(guest.expect(Op::Reset).src_port, 4);
    // A second request or a response, unknown operations, and data after the guest's shutdown.
    for op in [1, 2, 0, 8, u16::MAX] {
        let _host = guest.open_from_guest(5000, 77);
        guest.send_packet(Header { op, ..guest.header(5000, 77, Op::Data) }, &[]);
        guest.expect(Op::Reset);
    }
    let _host = guest.open_from_guest(5000, 77);
    guest.shut_down(5000, 77, 2);
    guest.send_packet(guest.header(5000, 77, Op::Data), &[1]);
    guest.expect(Op::Reset);
    still_serves(&mut guest);
}

#[test]
fn malformed_packets_are_given_back() {
    let mut guest = VsockGuest::new();
    let VsockGuest { driver, .. } = &mut guest;
    let data = |len| Header { len, src_cid: 3, dst_cid: 2, kind: 1, op: 5, ..Header::default() };
    for (len, chain) in [
        (0, &[(AT, HEADER_LEN as u32 - 1, false)][..]),
        (0, &[(AT, 0, false)]),
        (0, &[(AT, HEADER_LEN as u32, true)]),
        (0, &[(1 << 40, HEADER_LEN as u32, false)]),
        (100, &[(AT, HEADER_LEN as u32, false)]),
        (100, &[(AT, HEADER_LEN as u32, false), (AT, 99, false)]),
        (100, &[(AT, HEADER_LEN as u32, false), (u64::MAX - 50, 100, false)]),
        (65537, &[(AT, HEADER_LEN as u32, false), (AT, 65537, false)]),
        (u32::MAX, &[(AT, HEADER_LEN as u32, false), (AT, 100, false)]),
    ] {
        driver.put(AT, &data(len).to_bytes());
        assert_eq!(driver.request(TRANSMIT, chain), 0);
    }
    assert!(guest.try_receive().is_none());
    still_serves(&mut guest);
}

#[test]
fn receive_buffers_that_are_too_small_or_split_are_coped_with() {
    let mut guest = VsockGuest::without_buffers();
    let mut client = guest.client("CONNECT 1024\n");
    let driver = &mut guest.driver;
    for small in [(AT, 43, true), (AT, 100, false), (1 << 40, 4096, true)] {
        assert_eq!(driver.request(0, &[small]), 0);
    }
    let parts = [(AT, 40, true), (AT + 40, 4, true), (AT + 44, 6, true), (AT + 50, 6, true)];
    assert_eq!(driver.request(0, &parts), 44);
    let request = Header::from_bytes(driver.get(AT, HEADER_LEN).try_into().unwrap());
    guest.send(1024, request.src_port, Op::Response);
    client.write_all(&[5; 20]).unwrap();
    assert_eq!(guest.driver.request(0, &parts), 44 + 12);
    assert_eq!(guest.driver.get(AT + 44, 12), [5; 12]);
}

#[test]
fn a_receive_buffer_of_just_a_header_goes_back_unused() {
    let mut guest = VsockGuest::without_buffers();
    let mut client = guest.client("CONNECT 1024\n");
    assert_eq!(guest.driver.request(0, &[(AT, 4096, true)]), HEADER_LEN as u32);
    let request = Header::from_bytes(guest.driver.get(AT, HEADER_LEN).try_into().unwrap());
    guest.send(1024, request.src_port, Op::Response);
    client.write_all(&[5; 20]).unwrap();
    for _ in 0..10 {
        assert_eq!(guest.driver.request(0, &[(AT, HEADER_LEN as u32, true)]), 0);
    }
    assert_eq!(guest.driver.request(0, &[(AT, HEADER_LEN as u32 + 1, true)]), 45);
    // The worker still checks its stop.
    guest.driver.reset();
}

#[test]
fn a_host_that_comes_and_goes_leaves_nothing_for_a_guest_without_buffers() {
    let mut guest = VsockGuest::without_buffers();
    for _ in 0..500 {
        drop(guest.client("CONNECT 1024\n"));
    }
    // Neither request nor reset is left, because the guest got no request. Clients are accepted in
    // turn, so when the last is there, all others have been accepted.
    let _client = guest.client("CONNECT 1025\n");
    loop {
        let streams = guest.streams();
        assert!(streams.resets.is_empty());
        if streams.connections.iter().map(|stream| stream.guest_port).eq([1025]) {
            break;
        }
    }
    assert_eq!(guest.driver.request(0, &[(AT, 4096, true)]), HEADER_LEN as u32);
    let request = Header::from_bytes(guest.driver.get(AT, HEADER_LEN).try_into().unwrap());
    assert_eq!((request.op, request.dst_port), (Op::Request as u16, 1025));
}

#[test]
fn a_flood_of_requests_leaves_room_for_the_host() {
    let mut guest = VsockGuest::new();
    let mut hosts = Vec::new();
    for port in 0..MAX_GUEST_CONNECTIONS as u32 {
        hosts.push(guest.open_from_guest(port, 77));
    }
    for port in 0..1000 {
        guest.send(10_000 + port, 77, Op::Request);
        guest.expect(Op::Reset);
    }
    still_serves(&mut guest);
    // The host closes one stream, and the guest can open another.
    drop(hosts.pop());
    let flags = guest.expect(Op::Shutdown);
    guest.send(flags.dst_port, 77, Op::Reset);
    guest.open_from_guest(20_000, 77);
}

#[test]
fn resets_wait_for_a_guest_that_does_not_receive() {
    let mut guest = VsockGuest::without_buffers();
    for port in 0..200 {
        guest.send(port, 1, Op::Data);
    }
    for _ in 0..64 {
        guest.give_buffer();
    }
    for port in 0..200 {
        assert_eq!(guest.expect(Op::Reset).dst_port, port);
    }
    still_serves(&mut guest);
}

#[test]
fn resets_amid_everything_leave_no_thread_and_no_descriptor() {
    let mut guest = VsockGuest::new();
    let mut before = None;
    for round in 0..200 {
        for port in 0..8 {
            let _ = guest.open_from_guest(port, 77);
        }
        guest.driver.reset();
        let now = (count("/proc/self/fd"), count("/proc/self/task"));
        // Other tests run in this process, but a leak grows with each round.
        let before = *before.get_or_insert(now);
        assert!(now.0 < before.0 + 1400, "descriptors {now:?} after {round} rounds, {before:?}");
        assert!(now.1 < before.1 + 90, "threads {now:?} after {round} rounds, {before:?}");
        guest.driver.start();
        guest.restart();
    }
    still_serves(&mut guest);
}

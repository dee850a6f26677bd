//! Tests of streams: they carry every byte, in order, both ways, to the end.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;

use super::guest::{CREDIT, Op, VsockGuest};
use crate::devices::virtio::vsock::StreamState;

const SEND: u32 = 2;
const BOTH: u32 = 3;
const LEN: usize = 8 << 20;

fn pattern(seed: usize) -> Vec<u8> {
    (0..LEN).map(|n| (n.wrapping_mul(2_654_435_761) >> 11) as u8 ^ seed as u8).collect()
}

/// Moves [`LEN`] bytes both ways at once. The guest sends packets of up to 64 KiB, and has at most
/// [`CREDIT`] bytes unread.
fn exchange(guest: &mut VsockGuest, host: &UnixStream, ports: (u32, u32)) {
    let (to_host, to_guest) = (pattern(1), pattern(2));
    let expected = to_host.clone();
    let mut reader = host.try_clone().unwrap();
    let reader = thread::spawn(move || {
        let mut got = vec![0; LEN];
        reader.read_exact(&mut got).unwrap();
        assert!(got == expected, "the host got other bytes");
    });
    let mut writer = host.try_clone().unwrap();
    let sent = to_guest.clone();
    let writer = thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let (mut got, mut sent, mut allowed) = (Vec::new(), 0usize, 256 * 1024usize);
    let mut shut_down = false;
    while sent < LEN || !shut_down {
        let room = allowed.saturating_sub(sent).min(LEN - sent).min(65536);
        if room > 0 {
            let header = guest.header(ports.0, ports.1, Op::Data);
            guest.send_packet(header, &to_host[sent..sent + room]);
            sent += room;
        }
        let next = if room > 0 { guest.try_receive() } else { Some(guest.receive()) };
        let Some((header, data)) = next.filter(|(h, _)| h.dst_port == ports.0) else { continue };
        allowed = header.fwd_cnt as usize + header.buf_alloc as usize;
        match Op::from_raw(header.op) {
            Some(Op::Data) => {
                got.extend(data);
                let unread = got.len() - guest.fwd_cnt as usize;
                assert!(unread <= CREDIT as usize, "{unread} bytes without credit");
                if unread > CREDIT as usize / 2 {
                    guest.fwd_cnt = got.len() as u32;
                    guest.send(ports.0, ports.1, Op::CreditUpdate);
                }
            }
            Some(Op::Shutdown) => {
                assert_eq!(header.flags, SEND);
                shut_down = true;
            }
            Some(Op::CreditUpdate) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(got == to_guest, "the guest got other bytes");
    reader.join().unwrap();
    writer.join().unwrap();
    // The guest ends its side too: the host sees the end, and the guest gets its reset.
    guest.shut_down(ports.0, ports.1, SEND);
    guest.until(Op::Reset, ports.0);
    assert_eq!((&*host).read(&mut [0]).unwrap(), 0);
}

#[test]
fn bytes_cross_both_ways_at_once_when_the_host_opened() {
    let mut guest = VsockGuest::new();
    let (client, host_port) = guest.open_from_host(1024);
    exchange(&mut guest, &client, (1024, host_port));
}

#[test]
fn bytes_cross_both_ways_at_once_when_the_guest_opened() {
    let mut guest = VsockGuest::new();
    let host = guest.open_from_guest(5000, 77);
    exchange(&mut guest, &host, (5000, 77));
}

#[test]
fn a_host_that_is_done_sending_still_receives() {
    let mut guest = VsockGuest::new();
    let (mut client, port) = guest.open_from_host(1024);
    client.write_all(b"last words").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.receive().1, b"last words");
    assert_eq!(guest.expect(Op::Shutdown).flags, SEND);
    guest.send_packet(guest.header(1024, port, Op::Data), b"answer");
    // The guest closes and gets its reset. The host gets the data, then the end.
    guest.shut_down(1024, port, BOTH);
    guest.expect(Op::Reset);
    let mut got = String::new();
    client.read_to_string(&mut got).unwrap();
    assert_eq!(got, "answer");
}

#[test]
fn a_guest_that_is_done_sending_still_receives() {
    let mut guest = VsockGuest::new();
    let mut host = guest.open_from_guest(5000, 77);
    guest.send_packet(guest.header(5000, 77, Op::Data), b"question");
    guest.shut_down(5000, 77, SEND);
    let mut got = String::new();
    host.read_to_string(&mut got).unwrap();
    assert_eq!(got, "question");
    host.write_all(b"answer").unwrap();
    assert_eq!(guest.receive().1, b"answer");
    drop(host);
    guest.expect(Op::Shutdown);
    guest.expect(Op::Reset);
}

#[test]
fn the_guest_is_reset_at_once_even_if_the_host_reads_late() {
    let mut guest = VsockGuest::new();
    let mut host = guest.open_from_guest(5000, 77);
    let data = vec![7; 65536];
    let mut sent = 0;
    // As many bytes as the host's socket and the VMM buffer without a reader.
    for _ in 0..4 {
        guest.send_packet(guest.header(5000, 77, Op::Data), &data);
        sent += data.len();
    }
    guest.shut_down(5000, 77, BOTH);
    guest.until(Op::Reset, 5000);
    let mut got = Vec::new();
    host.read_to_end(&mut got).unwrap();
    assert_eq!(got.len(), sent);
    // The ports are free again.
    guest.open_from_guest(5000, 77);
}

#[test]
fn what_the_host_wrote_before_it_closed_arrives() {
    let mut guest = VsockGuest::new();
    let (mut client, port) = guest.open_from_host(1024);
    client.write_all(&vec![9; 50_000]).unwrap();
    drop(client);
    // The guest sends to a closed socket meanwhile.
    guest.send_packet(guest.header(1024, port, Op::Data), &[1; 1000]);
    let (mut got, mut flags) = (0, 0);
    while flags != BOTH {
        let (header, data) = guest.receive();
        match Op::from_raw(header.op) {
            Some(Op::Data) => got += data.len(),
            Some(Op::Shutdown) => flags |= header.flags,
            other => assert_eq!(other, Some(Op::CreditUpdate)),
        }
        guest.fwd_cnt = got as u32;
        guest.send(1024, port, Op::CreditUpdate);
    }
    assert_eq!(got, 50_000);
    guest.send(1024, port, Op::Reset);
    guest.open_from_host(1024);
}

#[test]
fn what_follows_the_connect_line_is_not_forgotten() {
    let mut guest = VsockGuest::new();
    let mut client = guest.client("CONNECT 1024\nand more");
    let port = guest.expect(Op::Request).src_port;
    guest.send(1024, port, Op::Response);
    assert_eq!(guest.receive().1, b"and more");
    // A line may come in pieces.
    let mut slow = guest.client("CONN");
    slow.write_all(b"ECT 9\n").unwrap();
    assert_eq!(guest.expect(Op::Request).dst_port, 9);
    client.write_all(b"x").unwrap();
    assert_eq!(guest.receive().1, b"x");
}

#[test]
fn a_refusal_closes_the_client_without_an_answer() {
    let mut guest = VsockGuest::new();
    let mut client = guest.client("CONNECT 1024\n");
    let port = guest.expect(Op::Request).src_port;
    guest.send(1024, port, Op::Reset);
    assert_eq!(client.read(&mut [0; 16]).unwrap(), 0);
    for line in ["CONNECT\n", "CONNECT x\n", "CONNECT 4294967296\n", "HELLO 1\n", &"C".repeat(40)] {
        let end = guest.client(line).read(&mut [0; 16]);
        assert!(matches!(end, Ok(0)) || end.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset));
    }
    guest.open_from_host(1024);
}

#[test]
fn a_client_that_gives_up_is_taken_back() {
    let mut guest = VsockGuest::new();
    let client = guest.client("CONNECT 1024\n");
    let port = guest.expect(Op::Request).src_port;
    drop(client);
    let reset = guest.expect(Op::Reset);
    assert_eq!((reset.src_port, reset.dst_port), (port, 1024));
    // An answer of the guest that was on its way.
    guest.send(1024, port, Op::Response);
    guest.expect(Op::Reset);
}

#[test]
fn one_stream_that_stands_still_does_not_hold_up_another() {
    let mut guest = VsockGuest::new();
    let stalled = guest.open_from_guest(5000, 77);
    for _ in 0..4 {
        guest.send_packet(guest.header(5000, 77, Op::Data), &vec![0; 65536]);
    }
    guest.buf_alloc = 0;
    let (mut starved, _) = guest.open_from_host(1024);
    starved.write_all(&[1; 1000]).unwrap();
    guest.buf_alloc = CREDIT;
    let (client, port) = guest.open_from_host(1025);
    guest.fwd_cnt = 0;
    exchange(&mut guest, &client, (1025, port));
    drop(stalled);
}

#[test]
fn streams_whose_credit_ends_at_different_times_wait_for_more() {
    let mut guest = VsockGuest::new();
    let mut hosts = Vec::new();
    for (port, credit) in [(1024, 5000), (1025, 60_000)] {
        guest.buf_alloc = credit;
        hosts.push(guest.open_from_host(port));
    }
    for (client, _) in &mut hosts {
        client.set_nonblocking(true).unwrap();
        while client.write(&vec![7; 65536]).is_ok() {}
    }
    let mut got = [0, 0];
    while got != [5000, 60_000] {
        let (header, data) = guest.receive();
        assert_eq!(Op::from_raw(header.op), Some(Op::Data));
        got[(header.dst_port - 1024) as usize] += data.len();
    }
    // More credit for each in turn.
    for (n, port) in [(0, 1024), (1, 1025)] {
        guest.buf_alloc = 20_000;
        guest.fwd_cnt = got[n] as u32;
        guest.send(port, hosts[n].1, Op::CreditUpdate);
        let end = got[n] + 20_000;
        while got[n] < end {
            let (header, data) = guest.receive();
            assert_eq!(header.dst_port, port);
            got[n] += data.len();
        }
    }
    guest.driver.reset();
}

#[test]
fn streams_are_written_down_with_what_is_on_its_way() {
    let mut guest = VsockGuest::new();
    let host = guest.open_from_guest(5000, 77);
    for _ in 0..4 {
        guest.send_packet(guest.header(5000, 77, Op::Data), &vec![3; 65536]);
    }
    let (mut client, port) = guest.open_from_host(1024);
    client.write_all(&[4; 100]).unwrap();
    guest.until(Op::Data, 1024);
    let streams = guest.streams();
    let [stalled, open] = &streams.connections[..] else { panic!("{streams:?}") };
    assert_eq!((stalled.host_port, stalled.guest_port, stalled.opened_by_guest), (77, 5000, true));
    assert_eq!((stalled.received, stalled.peer_buf_alloc), (4 * 65536, CREDIT));
    let left = stalled.received - stalled.forwarded;
    assert!(left > 0 && stalled.backlog == vec![3; left as usize]);
    assert_eq!((open.host_port, open.guest_port, open.sent), (port, 1024, 100));
    assert_eq!((streams.resets.len(), open.state), (0, StreamState::Open));
    // All streams continue after each hold.
    let mut got = vec![0; 4 * 65536];
    for part in got.chunks_mut(65536) {
        guest.streams();
        (&host).read_exact(part).unwrap();
        client.write_all(&[4; 100]).unwrap();
        guest.until(Op::Data, 1024);
    }
    assert!(got.iter().all(|byte| *byte == 3));
}

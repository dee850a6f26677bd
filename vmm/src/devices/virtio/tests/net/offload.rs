//! Tests of checksum and segmentation offloads.

use super::wire::{HEADER_LEN, MAC, Wire, make_room, take, transmit, with_each_mover};
use crate::devices::virtio::tests::driver::Driver;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;

const ETHERNET: usize = 14;
const IP: usize = 20;
const TCP: usize = 20;
const HEADERS: usize = ETHERNET + IP + TCP;

fn sum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// A TCP segment of IPv4 with `len` bytes of data. Its checksum covers only the pseudo header.
fn segment(len: usize) -> Vec<u8> {
    let mut frame = [&MAC[..], &[2, 0, 0, 0, 0, 1], &[8, 0]].concat();
    let mut ip = vec![0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 9, 8, 1, 10, 9, 8, 7];
    ip[2..4].copy_from_slice(&((IP + TCP + len) as u16).to_be_bytes());
    let checksum = !sum(&ip);
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    let mut tcp =
        vec![0x10, 0, 0x20, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0];
    let pseudo = [&ip[12..20], &[0, 6], &((TCP + len) as u16).to_be_bytes()].concat();
    tcp[16..18].copy_from_slice(&sum(&pseudo).to_be_bytes());
    frame.extend(ip);
    frame.extend(tcp);
    frame.extend((0..len).map(|n| (n % 251) as u8));
    frame
}

/// Returns true if the checksum of a whole segment is right.
fn is_checked(frame: &[u8]) -> bool {
    let ip = &frame[ETHERNET..ETHERNET + IP];
    let tcp = &frame[ETHERNET + IP..];
    let pseudo = [&ip[12..20], &[0, 6], &(tcp.len() as u16).to_be_bytes()].concat();
    sum(&[&pseudo[..], tcp].concat()) == 0xffff
}

/// Returns the header (5.1.6) of a segment whose checksum is left to the receiver.
fn header(gso: u8, gso_size: u16) -> [u8; 10] {
    let mut header = [0; 10];
    (header[0], header[1]) = (NEEDS_CSUM, gso);
    header[2..4].copy_from_slice(&(HEADERS as u16).to_le_bytes());
    header[4..6].copy_from_slice(&gso_size.to_le_bytes());
    header[6..8].copy_from_slice(&((ETHERNET + IP) as u16).to_le_bytes());
    header[8..10].copy_from_slice(&16u16.to_le_bytes());
    header
}

/// A wire whose socket sends and receives IPv4 frames with headers.
fn wire() -> Wire {
    let wire = Wire::of("tap0", 1, 0x0800);
    wire.with_headers();
    wire
}

#[test]
fn the_guest_gets_segments_whole_and_says_so() {
    with_each_mover(|mover| {
        let wire = wire();
        let mut driver = Driver::started(Box::new(wire.device(mover)));
        let room = make_room(&mut driver, RECEIVE, 100, 2048);
        let frame = segment(60_000);
        wire.send(&[&header(GSO_TCPV4, 1460)[..], &frame].concat());
        let (packet, count) = take(&mut driver, RECEIVE, &room);
        assert_eq!(usize::from(count), (HEADER_LEN + frame.len()).div_ceil(2048));
        assert_eq!((packet[0], packet[1]), (NEEDS_CSUM, GSO_TCPV4));
        assert_eq!(packet[4..6], 1460u16.to_le_bytes());
        assert_eq!(packet[HEADER_LEN..], frame);
    });
}

#[test]
fn a_guest_without_segments_gets_frames() {
    with_each_mover(|mover| {
        let wire = wire();
        let mut driver = Driver::started_without(Box::new(wire.device(mover)), GUEST_TSO4);
        let room = make_room(&mut driver, RECEIVE, 100, 2048);
        wire.send(&[&header(GSO_TCPV4, 1460)[..], &segment(6000)].concat());
        let mut data = 0;
        while data < 6000 {
            let (packet, count) = take(&mut driver, RECEIVE, &room);
            assert_eq!((packet[1], count), (GSO_NONE, 1));
            data += packet.len() - HEADER_LEN - HEADERS;
        }
        assert_eq!(data, 6000);
        // The other offloads were still negotiated. Without the checksum there are none.
        driver.reset();
        driver.declined |= GUEST_CSUM;
        driver.start();
        let room = make_room(&mut driver, RECEIVE, 100, 2048);
        wire.send(&[&header(GSO_NONE, 0)[..], &segment(600)].concat());
        let (packet, _) = take(&mut driver, RECEIVE, &room);
        assert_eq!(packet[0], 0);
        assert!(is_checked(&packet[HEADER_LEN..]));
    });
}

#[test]
fn what_the_guest_leaves_to_do_is_passed_on() {
    with_each_mover(|mover| {
        let wire = wire();
        let mut driver = Driver::started(Box::new(wire.device(mover)));
        let frame = segment(50_000);
        let packet = [&header(GSO_TCPV4, 1448)[..], &[0, 0], &frame].concat();
        transmit(&mut driver, TRANSMIT, &packet, &[HEADER_LEN, HEADERS, 4096, 4096]);
        let sent = wire.receive();
        assert_eq!(sent[..2], [NEEDS_CSUM, GSO_TCPV4]);
        assert_eq!(sent[4..6], 1448u16.to_le_bytes());
        assert_eq!(sent[10..], frame);
    });
}

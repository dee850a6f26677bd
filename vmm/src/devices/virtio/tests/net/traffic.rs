//! Tests of frames in both directions, in any pieces.

use super::wire::{
    HEADER_LEN, MAC, Wire, config, frame, in_namespace, make_room, open_tap, packet, take,
    transmit, with_each_mover,
};
use crate::devices::virtio::net::Net;
use crate::devices::virtio::tests::driver::{Driver, EVENT_IDX};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

#[test]
fn the_guest_finds_what_was_configured() {
    with_each_mover(|mover| {
        let mut driver = Driver::started(Box::new(Wire::new(1).device(mover)));
        assert_eq!(driver.read(8), 1);
        assert_eq!(driver.config::<6>(0), MAC);
        assert_eq!(driver.config::<6>(6), [1, 0, 1, 0, 120, 5], "link up, one pair, 1400");
        assert_eq!(driver.queues.len(), 2, "no control queue for a single pair");
    });
}

#[test]
fn frames_go_out_whole_however_they_are_cut() {
    with_each_mover(|mover| {
        let wire = Wire::new(1);
        let mut driver = Driver::started(Box::new(wire.device(mover)));
        for (seed, pieces) in
            [&[][..], &[HEADER_LEN], &[1, 5, 3, 7, 900], &[10, 2, 14], &[300; 4]].iter().enumerate()
        {
            let packet = packet(1514, seed as u8);
            assert_eq!(transmit(&mut driver, TRANSMIT, &packet, pieces), 0);
            assert_eq!(wire.receive(), packet[HEADER_LEN..]);
        }
    });
}

#[test]
fn many_frames_keep_their_order() {
    with_each_mover(|mover| {
        for declined in [0, EVENT_IDX] {
            let wire = Wire::new(1);
            let mut driver = Driver::started_without(Box::new(wire.device(mover)), declined);
            // More than a turn of packets, and more than once around the ring.
            for round in 0..8 {
                for n in 0..100u8 {
                    let at = 0x80_0000 + u64::from(n) * 0x1000;
                    let packet = packet(60 + usize::from(n), n ^ round);
                    driver.put(at, &packet);
                    driver.offer(TRANSMIT, &[(at, packet.len() as u32, false)]);
                }
                for n in 0..100u8 {
                    driver.wait_used(TRANSMIT);
                    assert_eq!(wire.receive(), frame(60 + usize::from(n), n ^ round));
                }
            }
        }
    });
}

#[test]
fn frames_come_in_with_a_header() {
    with_each_mover(|mover| {
        let wire = Wire::new(1);
        let mut driver = Driver::started(Box::new(wire.device(mover)));
        let room = make_room(&mut driver, RECEIVE, 8, 2048);
        for (seed, len) in [(1, 60), (2, 1514), (3, 777)] {
            wire.send(&frame(len, seed));
            let (packet, count) = take(&mut driver, RECEIVE, &room);
            assert_eq!((count, packet.len()), (1, HEADER_LEN + len));
            assert_eq!(packet[..2], [0, 0], "nothing is left to do");
            assert_eq!(packet[HEADER_LEN..], frame(len, seed));
        }
    });
}

#[test]
fn a_frame_is_spread_over_small_buffers() {
    with_each_mover(|mover| {
        let wire = Wire::new(1);
        wire.set_mtu(9000);
        let mut driver = Driver::started(Box::new(wire.device(mover)));
        // The header may be split too.
        let room = make_room(&mut driver, RECEIVE, 200, 61);
        let long = frame(9014, 4);
        for _ in 0..2 {
            // The second frame does not fit, and waits for room.
            wire.send(&long);
        }
        let (packet, count) = take(&mut driver, RECEIVE, &room);
        assert_eq!(usize::from(count), (HEADER_LEN + long.len()).div_ceil(61));
        assert_eq!(packet[HEADER_LEN..], long);
        let room = room.into_iter().chain(make_room(&mut driver, RECEIVE, 150, 67)).collect();
        let (packet, count) = take(&mut driver, RECEIVE, &room);
        assert!(count > 100);
        assert_eq!(packet[HEADER_LEN..], long);
    });
}

#[test]
fn without_merging_a_frame_takes_one_chain_or_is_lost() {
    const MRG_RXBUF: u64 = 1 << 15;
    with_each_mover(|mover| {
        let wire = Wire::new(1);
        let mut driver = Driver::started_without(Box::new(wire.device(mover)), MRG_RXBUF);
        let room = make_room(&mut driver, RECEIVE, 8, 1000);
        wire.send(&frame(1400, 5));
        wire.send(&frame(900, 6));
        let (packet, count) = take(&mut driver, RECEIVE, &room);
        // The count is set without merging too (5.1.6.4.1), except by vhost-net.
        assert!(count == 1 || mover.is_kernel());
        assert_eq!(packet[HEADER_LEN..], frame(900, 6));
    });
}

#[test]
fn only_a_tap_with_headers_is_taken() {
    in_namespace(|| {
        let plain = open_tap("tap1", libc::IFF_TAP | libc::IFF_NO_PI);
        let error = Net::new(vec![plain], Vec::new(), None, &config()).err().unwrap().to_string();
        assert!(error.contains("without IFF_VNET_HDR"), "{error}");
        let file = tempfile::tempfile().unwrap().into();
        let error = Net::new(vec![file], Vec::new(), None, &config()).err().unwrap().to_string();
        assert!(error.starts_with("queue 0 of its tap: "), "{error}");
        let wire = Wire::new(1);
        let taps = vec![wire.taps[0].try_clone().unwrap()];
        let vhost = vec![tempfile::tempfile().unwrap().into()];
        let error = Net::new(taps, vhost, None, &config()).err().unwrap().to_string();
        assert!(error.starts_with("vhost-net: "), "{error}");
    });
}

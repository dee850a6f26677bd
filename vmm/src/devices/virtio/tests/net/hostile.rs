//! Tests of invalid drivers, and of changes to the tap by the host.

use std::os::fd::{AsFd, AsRawFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::wire::{
    HEADER_LEN, Mover, VHOST_NET, Wire, frame, in_namespace, make_room, packet, take, transmit,
};
use crate::devices::virtio::tests::driver::{Buffer, Driver, INDIRECT, NEXT, PATIENCE, WRITE};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const AT: u64 = 0x40_0000;

/// Checks that the device still serves both directions.
fn still_serves(driver: &mut Driver, wire: &Wire) {
    transmit(driver, TRANSMIT, &packet(200, 9), &[]);
    assert_eq!(wire.receive(), frame(200, 9));
    let room = make_room(driver, RECEIVE, 1, 1600);
    wire.send(&frame(200, 8));
    let (packet, _) = take(driver, RECEIVE, &room);
    assert_eq!(packet[HEADER_LEN..], frame(200, 8));
}

#[test]
fn packets_that_are_none_are_dropped() {
    in_namespace(|| {
        let wire = Wire::new(1);
        let mut driver = Driver::started(Box::new(wire.device(Mover::Threads)));
        let long: Vec<Buffer> = (0..100).map(|n| (AT + n * 4096, 4096, false)).collect();
        let chains: [&[Buffer]; 8] = [
            &[(AT, 0, false)],
            &[(AT, 1, false)],
            &[(AT, 11, false)],
            // A header alone, and with half an Ethernet header.
            &[(AT, 12, false)],
            &[(AT, 20, false)],
            &[(AT, 16 << 20, false)],
            // Chains with writable buffers.
            &[(AT, 12, false), (AT, 100, true)],
            &[(AT, 1500, true)],
        ];
        for chain in chains.into_iter().chain([&long[..]]) {
            assert_eq!(driver.request(TRANSMIT, chain), 0);
        }
        still_serves(&mut driver, &wire);
    });
}

#[test]
fn headers_that_lie_send_nothing_wrong() {
    in_namespace(|| {
        let wire = Wire::new(1);
        let mut driver = Driver::started(Box::new(wire.device(Mover::Threads)));
        for (flags, gso, hdr_len, gso_size, start, offset) in [
            (1, 0, 0, 0, u16::MAX, u16::MAX),
            (1, 0, 0, 0, 200, 0),
            (1, 1, 54, 0, 34, 16),
            (1, 1, u16::MAX, 1, 34, 16),
            (0, 1, 54, 1448, 0, 0),
            (1, 3, 54, 65535, 34, 6),
            (1, 77, 54, 1, 34, 6),
            (255, 255, 54, 1, 34, 6),
        ] {
            let mut packet = packet(100, 1);
            (packet[0], packet[1]) = (flags, gso);
            for (at, value) in [(2, hdr_len), (4, gso_size), (6, start), (8, offset)] {
                packet[at..at + 2].copy_from_slice(&u16::to_le_bytes(value));
            }
            // An IPv4 frame, so that the test does not receive the frames that get through.
            packet[HEADER_LEN + 12..HEADER_LEN + 14].copy_from_slice(&[8, 0]);
            assert_eq!(transmit(&mut driver, TRANSMIT, &packet, &[]), 0);
        }
        still_serves(&mut driver, &wire);
    });
}

#[test]
fn room_that_is_none_is_given_back_empty() {
    in_namespace(|| {
        let wire = Wire::new(1);
        let mut driver = Driver::started(Box::new(wire.device(Mover::Threads)));
        let chains: [&[Buffer]; 6] = [
            &[(AT, 11, true)],
            &[(AT, 0, true)],
            &[(AT, 5, true), (AT + 5, 6, true)],
            &[(AT, 1500, false)],
            &[(AT, 12, false), (AT, 1500, true)],
            &[(1 << 40, 1500, true)],
        ];
        for chain in chains {
            let head = driver.offer(RECEIVE, chain);
            wire.send(&frame(100, 1));
            assert_eq!(driver.wait_used(RECEIVE), (head, 0));
        }
        // No frame is lost.
        let room = make_room(&mut driver, RECEIVE, 6, 1600);
        for _ in 0..6 {
            assert_eq!(take(&mut driver, RECEIVE, &room).0[HEADER_LEN..], frame(100, 1));
        }
        still_serves(&mut driver, &wire);
    });
}

#[test]
fn rings_that_loop_or_run_ahead_hold_up_nobody() {
    in_namespace(|| {
        let wire = Wire::new(1);
        let mut driver = Driver::started(Box::new(wire.device(Mover::Threads)));
        let memory = driver.memory.clone();
        for queue in [RECEIVE, TRANSMIT] {
            let writable = if queue == RECEIVE { WRITE } else { 0 };
            let ring = &mut driver.queues[queue];
            let size = ring.size();
            ring.descriptor(&memory, 200, (AT, 16, NEXT | writable, 200));
            ring.descriptor(&memory, 201, (AT, 16, NEXT | writable, size));
            ring.descriptor(&memory, 202, (AT, 16, INDIRECT, 0));
            for head in [200, 201, 202, u16::MAX] {
                driver.queues[queue].make_available(&memory, head);
            }
            driver.kick_always(queue);
        }
        driver.reset();
        driver.start();
        still_serves(&mut driver, &wire);
        for queue in [RECEIVE, TRANSMIT] {
            driver.queues[queue].set_available(&memory, 30_000);
            wire.send(&frame(100, 1));
            driver.kick_always(queue);
        }
        driver.reset();
        driver.start();
        let room = make_room(&mut driver, RECEIVE, 4, 1600);
        assert_eq!(take(&mut driver, RECEIVE, &room).0[HEADER_LEN..], frame(100, 1));
        transmit(&mut driver, TRANSMIT, &packet(200, 9), &[]);
        assert_eq!(wire.receive(), frame(200, 9));
    });
}

#[test]
fn the_host_may_take_the_tap_away() {
    in_namespace(|| {
        let mut wire = Wire::new(1);
        let mut driver = Driver::started(Box::new(wire.device(Mover::Threads)));
        make_room(&mut driver, RECEIVE, 4, 1600);
        wire.take_down();
        // Sent packets are lost, as with a cut wire, and nothing else happens.
        for n in 0..100 {
            assert_eq!(transmit(&mut driver, TRANSMIT, &packet(200, n), &[]), 0);
        }
        wire.taps.clear();
        driver.reset();
    });
}

#[test]
fn a_start_that_fails_leaves_no_queue_to_the_kernel() {
    if !std::fs::exists(VHOST_NET).unwrap() {
        return eprintln!("left out: needs {VHOST_NET}");
    }
    in_namespace(|| {
        let wire = Wire::new(1);
        let mut driver = Driver::found(Box::new(wire.device(Mover::Kernel)));
        driver.negotiate();
        driver.set_up_queues();
        make_room(&mut driver, RECEIVE, 4, 1600);
        // The kernel refuses a kick descriptor of the second queue that is not an eventfd.
        let (_, kick) = driver.transport.worker_kicks().nth(TRANSMIT).unwrap();
        let file = tempfile::tempfile().unwrap();
        // SAFETY: the number remains that of an open descriptor, which its owner closes.
        assert!(unsafe { libc::dup2(file.as_raw_fd(), kick.as_raw_fd()) } >= 0);
        driver.write(0x70, 15);
        assert_eq!(driver.status() & 64, 64, "needs a reset");
        // The packet stays in the tap.
        wire.send(&frame(100, 1));
        let mut fds = [PollFd::new(wire.taps[0].as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::try_from(PATIENCE).unwrap()).unwrap(), 1);
        assert_eq!(driver.used(RECEIVE), None);
    });
}

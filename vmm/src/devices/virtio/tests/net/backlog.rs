//! Tests of a driver that makes no room, and of held devices.

use super::wire::{HEADER_LEN, Wire, frame, make_room, packet, take, transmit, with_each_mover};
use crate::devices::virtio::net::NetState;
use crate::devices::virtio::tests::driver::{Driver, EVENT_IDX};
use crate::devices::virtio::tests::state::state;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

#[test]
fn frames_wait_for_room_and_are_not_lost() {
    with_each_mover(|mover| {
        for declined in [0, EVENT_IDX] {
            let wire = Wire::new(1);
            let mut driver = Driver::started_without(Box::new(wire.device(mover)), declined);
            for n in 0..50 {
                wire.send(&frame(500, n));
            }
            // The other direction continues meanwhile.
            for n in 0..50 {
                transmit(&mut driver, TRANSMIT, &packet(100, n), &[]);
                assert_eq!(wire.receive(), frame(100, n));
            }
            for n in 0..50 {
                let room = make_room(&mut driver, RECEIVE, 1, 1600);
                let (packet, _) = take(&mut driver, RECEIVE, &room);
                assert_eq!(packet[HEADER_LEN..], frame(500, n));
            }
        }
    });
}

#[test]
fn a_held_device_loses_no_chain() {
    with_each_mover(|mover| {
        let wire = Wire::new(1);
        let mut driver = Driver::found(Box::new(wire.device(mover)));
        assert_eq!(state(&mut driver).device, None, "not in service");
        driver.start();
        let room = make_room(&mut driver, RECEIVE, 40, 1600);
        for n in 0..40 {
            wire.send(&frame(300, n));
            let (packet, _) = take(&mut driver, RECEIVE, &room);
            assert_eq!(packet[HEADER_LEN..], frame(300, n));
            transmit(&mut driver, TRANSMIT, &self::packet(200, n), &[]);
            assert_eq!(wire.receive(), frame(200, n));
            let device = state(&mut driver).device.unwrap();
            // Chains taken in advance are back in the ring.
            for queue in &device.queues {
                let done = u16::from(n) + 1;
                assert_eq!((queue.next_avail, queue.next_used), (done, done));
            }
            assert_eq!(device.own.read::<NetState>().unwrap().active_pairs, 1);
        }
    });
}

#[test]
fn frames_that_come_while_it_is_held_are_delivered() {
    with_each_mover(|mover| {
        let wire = Wire::new(1);
        let mut driver = Driver::started(Box::new(wire.device(mover)));
        for n in 0..50 {
            let room = make_room(&mut driver, RECEIVE, 1, 1600);
            wire.send(&frame(400, n));
            state(&mut driver);
            let (packet, _) = take(&mut driver, RECEIVE, &room);
            assert_eq!(packet[HEADER_LEN..], frame(400, n));
        }
    });
}

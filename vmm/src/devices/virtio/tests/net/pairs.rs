//! Tests of several queue pairs, and of the control queue that sets their number.

use super::wire::{HEADER_LEN, Wire, frame, make_room, transmit, with_each_mover};
use crate::devices::virtio::net::NetState;
use crate::devices::virtio::tests::driver::Driver;
use crate::devices::virtio::tests::state::state;

const PAIRS: usize = 3;
const CONTROL: usize = 2 * PAIRS;
const MQ: u64 = 1 << 22;
const CTRL_VQ: u64 = 1 << 17;

const OK: u8 = 0;
const ERROR: u8 = 1;

const COMMAND_AT: u64 = 0x60_0000;
const ANSWER_AT: u64 = 0x61_0000;

/// Sends a command. Returns the answer.
fn command(driver: &mut Driver, bytes: &[u8]) -> u8 {
    driver.put(COMMAND_AT, bytes);
    driver.put(ANSWER_AT, &[0xee]);
    let class = (COMMAND_AT, 2.min(bytes.len() as u32), false);
    let data = (COMMAND_AT + 2, bytes.len().saturating_sub(2) as u32, false);
    assert_eq!(driver.request(CONTROL, &[class, data, (ANSWER_AT, 1, true)]), 1);
    driver.get(ANSWER_AT, 1)[0]
}

fn set_pairs(driver: &mut Driver, pairs: u16) -> u8 {
    let [low, high] = pairs.to_le_bytes();
    command(driver, &[4, 0, low, high])
}

fn active(driver: &mut Driver) -> u16 {
    state(driver).device.unwrap().own.read::<NetState>().unwrap().active_pairs
}

/// A datagram with this source port.
fn datagram(port: u16) -> Vec<u8> {
    let mut frame = frame(60, 0);
    frame[12..14].copy_from_slice(&[8, 0]);
    let ip = [0x45, 0, 0, 46, 0, 1, 0, 0, 64, 17, 0, 0, 10, 9, 8, 1, 10, 9, 8, 7];
    frame[14..34].copy_from_slice(&ip);
    frame[34..36].copy_from_slice(&port.to_be_bytes());
    frame
}

/// Returns the receive queues that get frames. All frames of a flow go to one queue, so many flows
/// are sent.
fn reached(driver: &mut Driver, wire: &Wire) -> Vec<usize> {
    const FRAMES: usize = 64;
    for n in 0..FRAMES {
        wire.send(&datagram(5000 + n as u16));
    }
    let mut counts = [0; PAIRS];
    while counts.iter().sum::<usize>() < FRAMES {
        for (pair, count) in counts.iter_mut().enumerate() {
            while driver.used(2 * pair).is_some() {
                *count += 1;
            }
        }
        if counts.iter().sum::<usize>() < FRAMES {
            driver.wait_interrupt();
        }
    }
    (0..PAIRS).filter(|pair| counts[*pair] > 0).collect()
}

#[test]
fn frames_use_the_pairs_that_the_driver_wants() {
    with_each_mover(|mover| {
        let wire = Wire::of("tap0", PAIRS, 0x0800);
        let mut driver = Driver::started(Box::new(wire.device(mover)));
        assert_eq!(driver.queues.len(), CONTROL + 1);
        assert_eq!(driver.config::<2>(8), (PAIRS as u16).to_le_bytes());
        for round in 0..2 {
            for pair in 0..PAIRS {
                make_room(&mut driver, 2 * pair, 100, 1600);
            }
            assert_eq!(reached(&mut driver, &wire), [0], "the first only, to begin with");
            assert_eq!(set_pairs(&mut driver, PAIRS as u16), OK);
            for pair in 0..PAIRS {
                let packet = [&[0; HEADER_LEN][..], &datagram(pair as u16 + round)].concat();
                transmit(&mut driver, 2 * pair + 1, &packet, &[]);
                assert_eq!(wire.receive(), packet[HEADER_LEN..]);
            }
            assert_eq!(reached(&mut driver, &wire), [0, 1, 2]);
            for pair in 0..PAIRS {
                make_room(&mut driver, 2 * pair, 64, 1600);
            }
            assert_eq!(set_pairs(&mut driver, 2), OK);
            assert_eq!(active(&mut driver), 2);
            assert_eq!(reached(&mut driver, &wire), [0, 1]);
            driver.reset();
            driver.start();
        }
    });
}

#[test]
fn other_commands_are_refused() {
    with_each_mover(|mover| {
        let wire = Wire::of("tap0", PAIRS, 0x0800);
        let mut driver = Driver::started(Box::new(wire.device(mover)));
        for pairs in [0, PAIRS as u16 + 1, u16::MAX] {
            assert_eq!(set_pairs(&mut driver, pairs), ERROR);
        }
        // Another command of the class; promiscuous mode; an address; VLANs; offloads; a short
        // command.
        let commands: [&[u8]; 7] = [
            &[4, 1, 2, 0],
            &[0, 0, 1],
            &[1, 1, 2, 0, 0, 0, 0, 9],
            &[2, 0, 1, 0],
            &[5, 0],
            &[4, 0, 2],
            &[4],
        ];
        for bytes in commands {
            assert_eq!(command(&mut driver, bytes), ERROR, "{bytes:?}");
        }
        assert_eq!(active(&mut driver), 1);
        // A command without room for an answer is not executed.
        driver.put(COMMAND_AT, &[4, 0, 2, 0]);
        assert_eq!(driver.request(CONTROL, &[(COMMAND_AT, 4, false)]), 0);
        assert_eq!(active(&mut driver), 1);
        assert_eq!(set_pairs(&mut driver, 2), OK);
        assert_eq!(active(&mut driver), 2);
    });
}

#[test]
fn a_driver_may_do_without() {
    with_each_mover(|mover| {
        let wire = Wire::of("tap0", PAIRS, 0x0800);
        let mut driver = Driver::found(Box::new(wire.device(mover)));
        for declined in [MQ, CTRL_VQ] {
            driver.reset();
            driver.write(0x70, 3);
            let features = driver.offered() & !declined;
            for (select, half) in [(0, features), (1, features >> 32)] {
                driver.write(0x24, select);
                driver.write(0x20, half as u32);
            }
            driver.write(0x70, 11);
            assert_eq!(driver.status(), 3, "one makes no sense without the other");
        }
        driver.reset();
        driver.declined = MQ | CTRL_VQ;
        driver.start();
        make_room(&mut driver, 0, 100, 1600);
        assert_eq!(reached(&mut driver, &wire), [0]);
    });
}

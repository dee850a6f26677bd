//! Tests of the transport's registers and states.

use std::fs::File;

use super::driver::{Driver, EVENT_IDX, MEMORY_LEN, VERSION_1};
use crate::devices::virtio::block::Block;
use crate::devices::virtio::device::{Activation, VirtioDevice};
use crate::devices::virtio::rng::Rng;

pub(super) fn disk() -> Box<dyn VirtioDevice> {
    let file: File = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    Box::new(Block::new(file, "", false).unwrap())
}

#[test]
fn registers_are_as_linux_expects_them() {
    let mut driver = Driver::found(disk());
    assert_eq!((driver.read(0), driver.read(4), driver.read(8)), (0x7472_6976, 2, 2));
    assert_eq!(driver.read(0xb0), u32::MAX, "no shared memory");
    driver.start();
    // The driver checks that a queue is not in use, and resets the device before it forgets the
    // queue.
    assert_eq!(driver.read(0x44), 0, "there is no queue 1");
    driver.write(0x30, 0);
    assert_eq!(driver.read(0x44), 1);
    driver.reset();
    driver.write(0x30, 0);
    driver.write(0x44, 0);
    assert_eq!((driver.read(0x44), driver.read(0x60)), (0, 0));
    // Other offsets and other lengths read as zero.
    let mut two = [0; 2];
    crate::bus::BusDevice::read(&mut driver.transport, 0, &mut two);
    assert_eq!((two, driver.read(0xf0)), ([0; 2], 0));
}

#[test]
fn the_device_starts_only_in_order() {
    let mut driver = Driver::found(disk());
    driver.write(0x70, 1 | 2 | 4);
    assert_eq!(driver.status(), 3, "DRIVER_OK without FEATURES_OK");
    driver.reset();
    for (low, high) in [(0, 0), (EVENT_IDX as u32, 0), (1 << 31, (VERSION_1 >> 32) as u32)] {
        driver.reset();
        driver.write(0x70, 3);
        driver.write(0x24, 0);
        driver.write(0x20, low);
        driver.write(0x24, 1);
        driver.write(0x20, high);
        driver.write(0x24, 7);
        driver.write(0x20, u32::MAX);
        driver.write(0x70, 11);
        assert_eq!(driver.status(), 3, "features {high:x} {low:x}");
    }
    driver.reset();
    driver.write(0x30, 0);
    driver.write(0x44, 1);
    assert_eq!(driver.read(0x44), 0, "a queue before FEATURES_OK");
}

#[test]
fn queues_outside_memory_are_refused_until_a_reset() {
    let end = MEMORY_LEN as u64;
    for (desc, avail, used) in [
        (end, 0x4000, 0x8000),
        (0x1000, end - 8, 0x8000),
        (0x1000, 0x4000, end - 8),
        (u64::MAX - 15, 0x4000, 0x8000),
        (0x1000, u64::MAX - 1, 0x8000),
        (1 << 63, 1 << 62, 1 << 61),
    ] {
        let mut driver = Driver::found(disk());
        driver.negotiate();
        driver.set_up_queue(0, desc, avail, used);
        driver.write(0x70, 15);
        assert_eq!(driver.status(), 11 | 64);
        driver.write(0x70, 15);
        assert_eq!(driver.status(), 11 | 64, "still");
        driver.kick_always(0);
        driver.reset();
        driver.start();
    }
}

#[test]
fn a_queue_that_the_driver_leaves_out_stays_silent() {
    let mut driver = Driver::found(Box::<Rng>::default());
    driver.negotiate();
    driver.write(0x70, 15);
    assert_eq!(driver.status(), 15);
    driver.kick_always(0);
    assert_eq!(driver.get(0, 0x10), [0; 0x10]);
}

#[test]
fn odd_sizes_and_addresses_are_not_taken() {
    let mut driver = Driver::found(disk());
    driver.negotiate();
    driver.write(0x30, 0);
    for size in [0, 3, 512, 0x1_0000, u32::MAX] {
        driver.write(0x38, size);
    }
    driver.write(0x80, 0x1_0000);
    driver.write(0x80, 0x1_0001);
    driver.write(0x90, 0x1_4000);
    driver.write(0xa0, 0x1_8000);
    driver.write(0x44, 1);
    driver.write(0x70, 15);
    assert_eq!(driver.status(), 15);
    driver.write(0x44, 0);
    assert_eq!(driver.read(0x44), 1, "no queue changes in service");
}

#[test]
fn an_index_far_ahead_does_not_keep_a_worker_from_ending() {
    for event_idx in [true, false] {
        let mut driver =
            if event_idx { Driver::started(disk()) } else { Driver::started_with_flags(disk()) };
        let Driver { queues, memory, .. } = &mut driver;
        queues[0].set_available(memory, 20_000);
        driver.kick_always(0);
        driver.reset();
        // The device serves again.
        driver.start();
        driver.put(0x10_0000, &[0; 16]);
        let chain = [(0x10_0000, 16, false), (0x20_0000, 512, true), (0x30_0000, 1, true)];
        assert_eq!(driver.request(0, &chain), 513);
    }
}

#[test]
fn chains_that_loop_or_nest_are_given_back() {
    use super::driver::{INDIRECT, NEXT, WRITE};
    let mut driver = Driver::started(disk());
    let size = driver.queues[0].size();
    let memory = driver.memory.clone();
    let ring = &mut driver.queues[0];
    // A loop; a link to a missing descriptor; a table in a table; a table of odd length; a table
    // longer than the queue. A missing head follows below.
    ring.descriptor(&memory, 0, (0x10_0000, 16, NEXT, 0));
    ring.descriptor(&memory, 1, (0x10_0000, 16, NEXT, size));
    ring.descriptor(&memory, 2, (0x20_0000, 16, INDIRECT, 0));
    ring.descriptor(&memory, 3, (0x20_0000, 17, INDIRECT, 0));
    ring.descriptor(&memory, 4, (0x21_0000, 16 * 4096, INDIRECT, 0));
    let nested: Vec<u8> = [0x22_0000u64.to_le_bytes(), (16 | (4u64 << 32)).to_le_bytes()].concat();
    memory_write(&driver.memory, 0x20_0000, &nested);
    for n in 0..4096u64 {
        let flags = u64::from(NEXT | WRITE) << 32 | (n + 1) << 48;
        let entry = [0x30_0000u64.to_le_bytes(), (1 | flags).to_le_bytes()].concat();
        memory_write(&driver.memory, 0x21_0000 + 16 * n, &entry);
    }
    for head in [0, 1, 2, 3, 4] {
        driver.queues[0].make_available(&memory, head);
        driver.kick(0);
        let (used, len) = driver.wait_used(0);
        assert_eq!(used, head);
        assert!(len <= 1, "{len}");
    }
    driver.queues[0].make_available(&memory, u16::MAX);
    driver.queues[0].make_available(&memory, 0);
    driver.kick(0);
    assert_eq!(driver.wait_used(0).0, 0);
}

fn memory_write(memory: &crate::memory::GuestMemoryMap, at: u64, bytes: &[u8]) {
    vm_memory::Bytes::write_slice(memory, bytes, vm_memory::GuestAddress(at)).unwrap();
}

/// A device whose reset waits for a message.
struct Stuck(std::sync::mpsc::Receiver<()>);

impl VirtioDevice for Stuck {
    fn device_type(&self) -> u32 {
        4
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn has_worker(&self, _: usize) -> bool {
        false
    }

    fn activate(&mut self, _: Activation) -> std::io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) {
        self.0.recv().unwrap();
    }
}

#[test]
fn a_reset_that_takes_long_holds_up_no_vcpu() {
    let (go_on, may_go_on) = std::sync::mpsc::channel();
    let mut driver = Driver::started(Box::new(Stuck(may_go_on)));
    driver.write(0x70, 0);
    // The reset is not complete, and writes do not change that.
    assert_eq!(driver.status(), 64);
    for status in [0, 1, 3, 11, 15] {
        driver.write(0x70, status);
        assert_eq!(driver.status(), 64);
    }
    driver.write(0x30, 0);
    assert_eq!(driver.read(0x44), 0, "the queues are those of after the reset");
    assert!(driver.transport.state().is_err());
    go_on.send(()).unwrap();
    // A driver that only reads sees the change without an exit.
    while driver.shown.load(0x70) != 0 {
        std::thread::yield_now();
    }
    driver.start();
    // Other resets are complete at once.
    go_on.send(()).unwrap();
    driver.reset();
}

//! Tests of the block device.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::driver::{Buffer, Driver};
use crate::devices::virtio::block::Block;

const HEADER: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
const STATUS: u64 = 0x11_0000;
const SECTORS: u64 = 64;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

fn disk(read_only: bool) -> (Driver, File) {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&vec![0x55; 512 * SECTORS as usize + 100], 0).unwrap();
    let block = Block::new(file.try_clone().unwrap(), "serial-7", read_only).unwrap();
    (Driver::started(Box::new(block)), file)
}

/// Sends a request. Returns its status, and the number of bytes that the device reports as written.
fn request(driver: &mut Driver, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
    driver.put(HEADER, &kind.to_le_bytes());
    driver.put(HEADER + 8, &sector.to_le_bytes());
    driver.put(STATUS, &[0xee]);
    let chain = [&[(HEADER, 16, false)], data, &[(STATUS, 1, true)]].concat();
    let len = driver.request(0, &chain);
    (driver.get(STATUS, 1)[0], len)
}

#[test]
fn what_is_written_is_read_and_on_the_disk() {
    let (mut driver, file) = disk(false);
    assert_eq!(driver.config::<8>(0), SECTORS.to_le_bytes());
    let bytes: Vec<u8> = (0..4096u32).map(|n| (n / 7) as u8).collect();
    driver.put(DATA, &bytes);
    // Buffers need not be whole sectors, only their sum.
    let parts = [(DATA, 100, false), (DATA + 100, 1000, false), (DATA + 1100, 2996, false)];
    assert_eq!(request(&mut driver, 1, 8, &parts), (OK, 1));
    assert_eq!(request(&mut driver, 4, 0, &[]), (OK, 1));
    let mut on_disk = vec![0; 4096];
    file.read_exact_at(&mut on_disk, 4096).unwrap();
    assert_eq!(on_disk, bytes);
    let back = DATA + 0x1_0000;
    let parts = [(back, 7, true), (back + 7, 4089, true)];
    assert_eq!(request(&mut driver, 0, 8, &parts), (OK, 4097));
    assert_eq!(driver.get(back, 4096), bytes);
    assert_eq!(request(&mut driver, 8, 0, &[(DATA, 20, true)]), (OK, 21));
    assert_eq!(driver.get(DATA, 20), *b"serial-7\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn many_small_buffers_are_all_served() {
    let (mut driver, _file) = disk(false);
    let parts: Vec<Buffer> = (0..128).map(|n| (DATA + 600 * n, 256, true)).collect();
    assert_eq!(request(&mut driver, 0, 0, &parts), (OK, 128 * 256 + 1));
    assert_eq!(driver.get(DATA + 600 * 127, 256), [0x55; 256]);
}

#[test]
fn requests_off_the_disk_fail_and_touch_nothing() {
    let (mut driver, file) = disk(false);
    driver.put(DATA, &[9; 1024]);
    for (sector, len) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (u64::MAX / 512 + 1, 512),
        (0, 511),
        (0, 513),
        (0, 1),
    ] {
        assert_eq!(request(&mut driver, 1, sector, &[(DATA, len, false)]), (IO_ERROR, 1));
        assert_eq!(request(&mut driver, 0, sector, &[(DATA, len, true)]), (IO_ERROR, 1));
    }
    assert_eq!(driver.get(DATA, 1024), [9; 1024]);
    let mut on_disk = vec![0; 512 * SECTORS as usize + 100];
    file.read_exact_at(&mut on_disk, 0).unwrap();
    assert!(on_disk.iter().all(|b| *b == 0x55));
    assert_eq!(file.metadata().unwrap().len(), on_disk.len() as u64);
    for kind in [2, 11, 13, u32::MAX] {
        assert_eq!(request(&mut driver, kind, 0, &[(DATA, 512, true)]).0, UNSUPPORTED);
    }
    assert_eq!(request(&mut driver, 8, 0, &[(DATA, 19, true)]), (IO_ERROR, 1));
}

#[test]
fn a_request_for_too_much_is_refused() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 << 20).unwrap();
    let mut driver = Driver::started(Box::new(Block::new(file, "", false).unwrap()));
    assert_eq!(driver.config::<8>(8), [0, 0, 2, 0, 128, 0, 0, 0], "size_max and seg_max");
    let segments = |count| vec![(DATA, 128 << 10, true); count];
    assert_eq!(request(&mut driver, 0, 0, &segments(128)), (OK, (16 << 20) + 1));
    assert_eq!(request(&mut driver, 0, 0, &segments(129)), (IO_ERROR, 1));
    assert_eq!(request(&mut driver, 0, 0, &[(DATA, 17 << 20, true)]), (IO_ERROR, 1));
}

#[test]
fn a_read_only_disk_is_read_only() {
    let (mut driver, file) = disk(true);
    assert_eq!(request(&mut driver, 1, 0, &[(DATA, 512, false)]), (IO_ERROR, 1));
    assert_eq!(request(&mut driver, 0, 0, &[(DATA, 512, true)]), (OK, 513));
    let mut first = [0; 512];
    file.read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first, [0x55; 512]);
}

#[test]
fn malformed_chains_are_given_back() {
    let (mut driver, _file) = disk(false);
    driver.put(HEADER, &[0; 16]);
    for chain in [
        &[(HEADER, 16, false)][..],
        &[(HEADER, 16, false), (DATA, 512, false)],
        &[(HEADER, 16, false), (STATUS, 0, true)],
        &[(DATA, 512, true), (HEADER, 16, false), (STATUS, 1, true)],
        &[(HEADER, 16, false), (1 << 50, 512, true), (STATUS, 1, true)],
        &[(HEADER, 16, false), (DATA, u32::MAX, true), (STATUS, 1, true)],
    ] {
        assert_eq!(driver.request(0, chain), 0);
    }
    driver.put(STATUS, &[0xee]);
    assert_eq!(driver.request(0, &[(HEADER, 15, false), (STATUS, 1, true)]), 1);
    assert_eq!(driver.get(STATUS, 1), [IO_ERROR]);
    // A status alone has no header.
    assert_eq!(driver.request(0, &[(STATUS, 1, true)]), 1);
    assert_eq!(request(&mut driver, 0, 0, &[(DATA, 512, true)]), (OK, 513));
}

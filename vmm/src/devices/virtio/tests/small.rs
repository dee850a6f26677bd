//! Tests of the entropy and balloon devices.

use super::driver::Driver;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::rng::Rng;

const AT: u64 = 0x10_0000;

#[test]
fn entropy_flows_for_every_request() {
    for mut driver in
        [Driver::started(Box::<Rng>::default()), Driver::started_with_flags(Box::<Rng>::default())]
    {
        for round in 0..100u64 {
            let at = AT + 0x1000 * round;
            assert_eq!(driver.request(0, &[(at, 32, true), (at + 64, 32, true)]), 64);
            assert_ne!(driver.get(at, 32), [0; 32]);
            assert_eq!(driver.get(at + 32, 32), [0; 32]);
        }
    }
}

#[test]
fn entropy_is_bounded_and_stays_in_memory() {
    let mut driver = Driver::started(Box::<Rng>::default());
    assert_eq!(driver.request(0, &[(AT, 1 << 20, true)]), 4096);
    assert_eq!(driver.request(0, &[(AT, 16, false)]), 0);
    for outside in [u64::MAX, u64::MAX - 8, super::driver::MEMORY_LEN as u64 - 8] {
        driver.offer(0, &[(outside, 16, true)]);
        // The invalid chain is given back unused, and the next one is served.
        assert_eq!(driver.wait_used(0).1, 0);
        assert_eq!(driver.request(0, &[(AT, 16, true)]), 16);
    }
}

#[test]
fn reported_and_inflated_pages_go_and_nothing_else() {
    let mut driver = Driver::started(Box::<Balloon>::default());
    for round in 0..50u64 {
        let at = AT + 0x1_0000 * round;
        driver.put(at, &[7; 0x4000]);
        // Two whole pages, and a page of which only both ends are reported.
        assert_eq!(driver.request(2, &[(at + 0x800, 0x2900, true)]), 0);
        assert_eq!(driver.get(at, 0x1000), [7; 0x1000]);
        assert_eq!(driver.get(at + 0x1000, 0x2000), [0; 0x2000]);
        assert_eq!(driver.get(at + 0x3000, 0x1000), [7; 0x1000]);
    }
    driver.put(AT, &[7; 0x2000]);
    let numbers: Vec<u8> =
        [(AT >> 12) as u32, u32::MAX, 0x4000].iter().flat_map(|n| n.to_le_bytes()).collect();
    driver.put(0x30_0000 + 0x10_0000 * 8, &numbers);
    assert_eq!(driver.request(0, &[(0x30_0000 + 0x10_0000 * 8, 12, false)]), 0);
    assert_eq!(driver.get(AT, 0x1000), [0; 0x1000]);
    assert_eq!(driver.get(AT + 0x1000, 0x1000), [7; 0x1000]);
    assert_eq!(driver.request(1, &[(0x30_0000 + 0x10_0000 * 8, 12, false)]), 0);
}

#[test]
fn reports_outside_memory_change_nothing() {
    let mut driver = Driver::started(Box::<Balloon>::default());
    let end = super::driver::MEMORY_LEN as u64;
    for buffer in [(end - 0x1000, 0x2000, true), (end, 0x1000, true), (1 << 40, u32::MAX, true)] {
        assert_eq!(driver.request(2, &[buffer]), 0);
    }
    assert_eq!(driver.config::<8>(0), [0; 8]);
    assert_eq!(driver.config::<4>(6), [0; 4]);
}

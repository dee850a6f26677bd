//! Tests of the state of held devices, which continue afterwards.

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::driver::Driver;
use super::transport::disk;
use crate::control::EndReason;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::interrupt::Interrupt;
use crate::devices::virtio::mmio::MmioState;
use crate::devices::virtio::queue::ActiveQueue;
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::state::{OwnState, QueueState};
use crate::devices::virtio::worker::Workers;

const AT: u64 = 0x10_0000;

/// Returns the state, serialised and deserialised as JSON.
pub(super) fn state(driver: &mut Driver) -> MmioState {
    let state = driver.transport.state().unwrap();
    let json = serde_json::to_string(&state).unwrap();
    let read: MmioState = serde_json::from_str(&json).unwrap();
    assert_eq!(read, state);
    state
}

#[test]
fn a_disk_goes_on_where_it_was_held() {
    let mut driver = Driver::found(disk());
    assert_eq!(state(&mut driver).device, None, "not in service");
    driver.start();
    driver.put(AT, &[0; 16]);
    let chain = [(AT, 16, false), (AT + 0x1000, 512, true), (AT + 0x2000, 1, true)];
    for round in 0..1000u16 {
        assert_eq!(driver.request(0, &chain), 513);
        if round % 100 == 0 {
            let device = state(&mut driver).device.unwrap();
            let queue = device.queues[0];
            assert_eq!((queue.next_avail, queue.next_used), (round + 1, round + 1));
            assert!(queue.ready && queue.event_idx && !queue.dead);
            assert_eq!((queue.size, queue.desc_table), (256, 0x1_0000));
            assert_eq!(device.own, OwnState::default());
        }
    }
}

#[test]
fn a_request_that_comes_while_a_disk_is_held_is_served() {
    let mut driver = Driver::started(disk());
    driver.put(AT, &[0; 16]);
    let chain = [(AT, 16, false), (AT + 0x1000, 512, true), (AT + 0x2000, 1, true)];
    for _ in 0..200 {
        driver.offer(0, &chain);
        state(&mut driver);
        assert_eq!(driver.wait_used(0).1, 513);
    }
}

#[test]
fn a_queue_made_from_its_state_goes_on_in_its_ring() {
    let mut driver = Driver::started(Box::<Rng>::default());
    for _ in 0..20 {
        assert_eq!(driver.request(0, &[(AT, 16, true)]), 16);
    }
    let rng = state(&mut driver).device.unwrap();
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let memory = driver.memory.clone();
    let queue = |state: &QueueState| {
        ActiveQueue::from_state(state, &memory, event(), Interrupt::new(event()))
    };
    let mut restored = queue(&rng.queues[0]).unwrap();
    assert_eq!(restored.state(), rng.queues[0]);
    assert!(restored.pop(&memory).is_none());
    let head = driver.queues[0].add(&memory, &[(AT, 16, true)]);
    assert_eq!(restored.pop(&memory).map(|chain| chain.head), Some(head));
    let mut outside = rng.queues[0];
    outside.used_ring = 1 << 40;
    assert!(queue(&outside).is_err());
    outside.max_size = 3;
    assert!(queue(&outside).is_err());
    // The state has all queues of the balloon.
    let mut driver = Driver::started(Box::<Balloon>::default());
    driver.request(2, &[(AT, 0x1000, true)]);
    let queues = state(&mut driver).device.unwrap().queues;
    assert_eq!(queues.iter().map(|queue| queue.next_used).collect::<Vec<_>>(), [0, 0, 1]);
}

#[test]
fn a_worker_that_cannot_go_on_ends_the_machine() {
    let driver = Driver::found(disk());
    let mut workers = Workers::telling(driver.end.clone()).unwrap();
    workers.spawn("one", |stop| stop.fail("no more".to_owned())).unwrap();
    // The other worker is stopped too.
    workers.spawn("other", |stop| while !stop.is_given() {}).unwrap();
    drop(workers);
    let reason = EndReason::VmmFailed { message: "no more".to_owned() };
    assert_eq!(driver.end.reason(), Some(reason));
    assert_eq!(driver.end.event().read().unwrap(), 1);
}

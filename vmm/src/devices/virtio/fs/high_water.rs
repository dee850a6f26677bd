//! Notice that the guest should forget files. Virtio-fs has no message for it.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use crate::sync::lock;

/// Divisor of the number of nodes that a guest may have. Above that part the guest should forget.
const MARK: usize = 4;

/// Least time between two notices, because forgetting takes the guest time.
const INTERVAL: Duration = Duration::from_secs(2);

/// Notifies the main thread when the guest knows of many files.
pub(super) struct HighWater {
    event: EventFd,
    last: Mutex<Option<Instant>>,
}

impl HighWater {
    pub(super) fn new(event: EventFd) -> Self {
        Self { event, last: Mutex::default() }
    }

    /// Sends the notice if the guest knows of too many nodes: `nodes` of at most `max`.
    pub(super) fn check(&self, nodes: usize, max: usize) {
        if nodes <= max / MARK {
            return;
        }
        let mut last = lock(&self.last);
        if last.is_none_or(|last| last.elapsed() >= INTERVAL) {
            *last = Some(Instant::now());
            // A full counter is readable as well.
            let _ = self.event.write(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[test]
    fn it_is_told_once_above_the_mark() {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let high_water = HighWater::new(event.try_clone().unwrap());
        high_water.check(10, 40);
        assert!(event.read().is_err());
        high_water.check(11, 40);
        high_water.check(12, 40);
        assert_eq!(event.read().unwrap(), 1);
    }
}

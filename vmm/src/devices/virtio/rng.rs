//! Entropy device (virtio 1.2, 5.4): random bytes from the host's `getrandom`.

use std::io;

use super::chain::returned;
use super::device::{Activation, VirtioDevice};
use super::queue::ActiveQueue;
use super::state::{DeviceState, OwnState};
use crate::memory::GuestMemoryMap;

const DEVICE_TYPE: u32 = 4;
const QUEUE_SIZES: [u16; 1] = [16];

/// Most bytes for one request. The driver asks again for more.
const REQUEST_LEN: usize = 4096;

/// The entropy device. Requests are small and rare, so the vCPU that sends a request serves it.
#[derive(Default)]
pub struct Rng {
    active: Option<(GuestMemoryMap, ActiveQueue)>,
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn has_worker(&self, _index: usize) -> bool {
        false
    }

    fn activate(&mut self, active: Activation) -> io::Result<()> {
        let [queue] = <[_; 1]>::try_from(active.queues)
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        self.active = Some((active.memory, queue));
        Ok(())
    }

    fn notify(&mut self, _index: usize) {
        let Some((memory, queue)) = &mut self.active else { return };
        // Bounded to a turn of the ring and some for a kick, so that the vCPU can go on.
        for _ in 0..2 * QUEUE_SIZES[0] {
            let Some(mut chain) = queue.pop(memory) else {
                if queue.enable_kicks(memory) {
                    continue;
                }
                break;
            };
            chain.writable.truncate(REQUEST_LEN);
            let mut written = 0;
            for slice in chain.writable.slices() {
                // SAFETY: the slice is `slice.len()` bytes of guest memory, which stays mapped
                // while `memory` lives. Only the guest can see the bytes change.
                let result = unsafe {
                    libc::getrandom(slice.ptr_guard_mut().as_ptr().cast(), slice.len(), 0)
                };
                let len = returned(result).unwrap_or(0);
                written += len as u32;
                // The written bytes must have no gap (5.4.6.2).
                if len < slice.len() {
                    break;
                }
            }
            queue.push(memory, chain.head, written);
        }
        queue.signal(memory);
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn state(&self) -> Option<DeviceState> {
        let (_, queue) = self.active.as_ref()?;
        // The host keeps the entropy.
        Some(DeviceState { queues: vec![queue.state()], own: OwnState::default() })
    }
}

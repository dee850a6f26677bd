//! Memory balloon (virtio 1.2, 5.5), for free page reporting (5.5.6.7): unused pages of the guest
//! go back to the host.

use std::io;

use vm_memory::VolatileSlice;

use super::device::{Activation, VirtioDevice, read_from};
use super::queue::ActiveQueue;
use super::state::{DeviceState, OwnState};
use crate::memory::GuestMemoryMap;

const DEVICE_TYPE: u32 = 5;

/// Inflate, deflate and reporting queue. Linux numbers only the queues that exist, and the
/// statistics and hinting queues do not.
const QUEUE_SIZES: [u16; 3] = [16, 16, 64];
const INFLATE: usize = 0;
const REPORTING: usize = 2;

const FEATURE_DEFLATE_ON_OOM: u64 = 1 << 2;
const FEATURE_REPORTING: u64 = 1 << 5;

/// Size of a balloon page: 4 KiB on every host (5.5.6).
const BALLOON_PAGE_SIZE: u64 = 4096;

/// Most bytes of page numbers in one chain. Linux sends 256 numbers of 4 bytes. The rest of a
/// longer list is ignored, because each number costs the vCPU a system call.
const INFLATE_LEN: usize = 4096;

/// The balloon device. Reports come at most every two seconds, so the vCPU that sends a report
/// serves it.
#[derive(Default)]
pub struct Balloon {
    active: Option<(GuestMemoryMap, Vec<ActiveQueue>)>,
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURE_DEFLATE_ON_OOM | FEATURE_REPORTING
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // num_pages and actual: the host never asks for pages.
        read_from(&[0; 8], offset, data);
    }

    fn has_worker(&self, _index: usize) -> bool {
        false
    }

    fn activate(&mut self, active: Activation) -> io::Result<()> {
        self.active = Some((active.memory, active.queues));
        Ok(())
    }

    fn notify(&mut self, index: usize) {
        let Some((memory, queues)) = &mut self.active else { return };
        let Some(queue) = queues.get_mut(index) else { return };
        // Bounded to a turn of the ring and some for a kick, so that the vCPU can go on.
        for _ in 0..2 * QUEUE_SIZES[index] {
            let Some(chain) = queue.pop(memory) else {
                if queue.enable_kicks(memory) {
                    continue;
                }
                break;
            };
            match index {
                // The writable buffers of the chain are the free pages.
                REPORTING => chain.writable.slices().iter().for_each(discard),
                // A list of page numbers, whose pages the guest does not use until it deflates.
                INFLATE => {
                    let mut numbers = chain.readable;
                    numbers.truncate(INFLATE_LEN);
                    while let Some(number) = numbers.take::<4>() {
                        discard_page(memory, u32::from_le_bytes(number));
                    }
                }
                // Deflating needs no work: a touched page comes back.
                _ => {}
            }
            queue.push(memory, chain.head, 0);
        }
        queue.signal(memory);
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn state(&self) -> Option<DeviceState> {
        let (_, queues) = self.active.as_ref()?;
        let queues = queues.iter().map(ActiveQueue::state).collect();
        // A page in the balloon is a page that is not resident.
        Some(DeviceState { queues, own: OwnState::default() })
    }
}

fn discard_page(memory: &GuestMemoryMap, number: u32) {
    use vm_memory::{GuestAddress, GuestMemory};
    let address = GuestAddress(u64::from(number) * BALLOON_PAGE_SIZE);
    if let Ok(page) = memory.get_slice(address, BALLOON_PAGE_SIZE as usize) {
        discard(&page);
    }
}

/// Gives the whole pages within `slice` back to the host. They read as zeros later.
fn discard(slice: &VolatileSlice<'_>) {
    const PAGE_MASK: usize = 4095;
    let start = slice.ptr_guard_mut().as_ptr() as usize;
    let first = (start + PAGE_MASK) & !PAGE_MASK;
    let end = (start + slice.len()) & !PAGE_MASK;
    if end <= first {
        return;
    }
    // SAFETY: the range lies within one mapping of guest memory, which is private and anonymous and
    // holds nothing of the VMM's. The guest asked to drop its pages.
    let result = unsafe { libc::madvise(first as *mut _, end - first, libc::MADV_DONTNEED) };
    debug_assert_eq!(result, 0);
}

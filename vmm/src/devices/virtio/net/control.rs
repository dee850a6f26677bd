//! The control queue (5.1.6.5). It serves only the command that sets the number of queue pairs.

use crate::devices::virtio::chain::Buffers;
use crate::devices::virtio::queue::ActiveQueue;
use crate::memory::GuestMemoryMap;

const CLASS_MQ: u8 = 4;
const MQ_VQ_PAIRS_SET: u8 = 0;

const OK: u8 = 0;
const ERROR: u8 = 1;

/// The control queue, served by the vCPU that kicks it: its driver waits for the answer in a loop.
pub(super) struct Control {
    memory: GuestMemoryMap,
    pub(super) queue: ActiveQueue,
}

impl Control {
    pub(super) fn new(memory: GuestMemoryMap, queue: ActiveQueue) -> Self {
        Self { memory, queue }
    }

    /// Answers the driver's commands. `set_pairs` returns true if it could set the number.
    pub(super) fn serve(&mut self, mut set_pairs: impl FnMut(u16) -> bool) {
        let Self { memory, queue } = self;
        // Bounded to a turn of the ring and some for a kick, so that the vCPU can go on.
        for _ in 0..2 * queue.size() {
            let Some(mut chain) = queue.pop(memory) else {
                if queue.enable_kicks(memory) {
                    continue;
                }
                break;
            };
            // The answer is the only writable byte. A command without room for it is not executed.
            let mut written = 0;
            if !chain.writable.is_empty() {
                let done = pairs_wanted(&mut chain.readable).is_some_and(&mut set_pairs);
                let answer = if done { OK } else { ERROR };
                written = chain.writable.put(&[answer]).map_or(0, |()| 1);
            }
            queue.push(memory, chain.head, written);
        }
        queue.signal(memory);
    }
}

/// Returns the number of queue pairs, if the command sets it.
fn pairs_wanted(command: &mut Buffers<'_>) -> Option<u16> {
    let [class, what] = command.take()?;
    if (class, what) != (CLASS_MQ, MQ_VQ_PAIRS_SET) {
        return None;
    }
    command.take().map(u16::from_le_bytes)
}

//! The control queue (5.1.6.5), of which only the number of queue pairs is served.

use crate::devices::virtio::ActiveQueue;
use crate::devices::virtio::chain::Buffers;
use crate::memory::GuestMemoryMap;

const CLASS_MQ: u8 = 4;
const MQ_VQ_PAIRS_SET: u8 = 0;

const OK: u8 = 0;
const ERROR: u8 = 1;

/// The queue, for the vCPU that kicks it: its driver waits for the answer in a loop.
pub(super) struct Control {
    memory: GuestMemoryMap,
    pub(super) queue: ActiveQueue,
}

impl Control {
    pub(super) fn new(memory: GuestMemoryMap, queue: ActiveQueue) -> Self {
        Self { memory, queue }
    }

    /// Answers what the driver asks. `set_pairs` says whether it could be done.
    pub(super) fn serve(&mut self, mut set_pairs: impl FnMut(u16) -> bool) {
        let Self { memory, queue } = self;
        // At most a turn of the ring and some for a kick, so that the vCPU gets on.
        for _ in 0..2 * queue.size() {
            let Some(mut chain) = queue.pop(memory) else {
                if queue.enable_kicks(memory) {
                    continue;
                }
                break;
            };
            // The answer is the only writable byte. Without room for it nothing is done.
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

/// How many queue pairs are wanted, if that is what the command says.
fn pairs_wanted(command: &mut Buffers<'_>) -> Option<u16> {
    let [class, what] = command.take()?;
    if (class, what) != (CLASS_MQ, MQ_VQ_PAIRS_SET) {
        return None;
    }
    command.take().map(u16::from_le_bytes)
}

//! Memory that processes share by mapping a file.

use std::fs::OpenOptions;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap};

const LEN: u64 = 32 * 1024;

/// Maps a file and counts up in it. Opens the file again for each block, as the processes that
/// share a database's index do. Another process may count at the same time.
pub(crate) fn count(path: &str, blocks: u64) {
    for _ in 0..blocks {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .expect("the file");
        file.set_len(LEN).expect("its length");
        let len = NonZeroUsize::new(LEN as usize).expect("a length");
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, of a file that is as long, and never taken down.
        let mapped = unsafe { mmap(None, len, access, MapFlags::MAP_SHARED, &file, 0) };
        let counter = mapped.expect("a mapping").cast::<AtomicU64>();
        // SAFETY: the mapping is aligned to a page, large enough, and there until the process ends.
        let counter = unsafe { counter.as_ref() };
        for _ in 0..1000 {
            counter.fetch_add(1, Ordering::SeqCst);
        }
    }
}

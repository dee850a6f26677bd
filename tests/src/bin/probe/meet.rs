//! Two processes that map a file and see each other's marks in it.

use std::fs::File;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU8, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap};

const PAGE: NonZeroUsize = NonZeroUsize::new(4096).expect("not 0");

/// Maps a file, sets the mark at `own` and waits for another process's mark at `other`.
pub(crate) fn meet(path: &str, own: u64, other: u64) {
    let mut options = File::options();
    let file = options.read(true).write(true).create(true).truncate(false).open(path);
    let file = file.unwrap_or_else(|e| panic!("{path}: {e}"));
    file.set_len(PAGE.get() as u64).expect("the file's size");
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at a place of the kernel's choice, which is never unmapped.
    let page =
        unsafe { mmap(None, PAGE, protection, MapFlags::MAP_SHARED, &file, 0) }.expect("mmap");
    // SAFETY: the whole mapping, which stays. Other processes change it as atomically.
    let marks = unsafe { std::slice::from_raw_parts(page.as_ptr().cast::<AtomicU8>(), PAGE.get()) };
    let mark = |at: u64| {
        let at = usize::try_from(at).ok();
        at.and_then(|at| marks.get(at)).expect("within a page")
    };
    mark(own).store(1, Ordering::SeqCst);
    while mark(other).load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    println!("met");
}

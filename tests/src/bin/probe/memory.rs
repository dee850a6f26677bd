//! Use of all memory and processes that there are, and of more.

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::unistd::{ForkResult, fork, pause};
use serde_json::{Value, json};

const PAGE: usize = 4096;
const MIB: usize = 1 << 20;

/// Forks until fork(2) fails, prints the number of forks, and stays with its children.
pub(crate) fn fork_bomb() {
    // Bounded even without a limit on processes.
    for count in 1..=4096 {
        // SAFETY: this process has one thread, so the child may do anything after the fork.
        match unsafe { fork() } {
            Ok(ForkResult::Parent { .. }) => {}
            Ok(ForkResult::Child) => loop {
                pause();
            },
            Err(e) => {
                println!("{e:?} after {count} forks");
                break;
            }
        }
    }
    loop {
        pause();
    }
}

/// Touches `mib` MiB, with a line of output after each 16.
pub(crate) fn eat(mib: u64) {
    let mib = usize::try_from(mib).expect("a size");
    let mut held: Vec<Vec<u8>> = Vec::new();
    for count in 1..=mib {
        let mut block = vec![0_u8; MIB];
        for at in (0..MIB).step_by(PAGE) {
            block[at] = 1;
        }
        held.push(std::hint::black_box(block));
        if count % 16 == 0 {
            println!("{count}");
        }
    }
    println!("ate {mib}");
}

/// Takes memory until pages on both sides of the 32-bit device hole are held, each with a mark of
/// its own. Then checks all marks. The physical addresses come from /proc/self/pagemap, which needs
/// CAP_SYS_ADMIN.
pub(crate) fn across_the_hole() -> Value {
    const CHUNK: usize = 16 * MIB;
    const ENOUGH: usize = 64 * MIB / PAGE;
    let pagemap = File::open("/proc/self/pagemap").expect("/proc/self/pagemap");
    let total = meminfo_kib("MemTotal");
    let mut chunks = Vec::new();
    let (mut below, mut above, mut highest) = (0, 0, 0);
    while (below < ENOUGH || above < ENOUGH) && meminfo_kib("MemAvailable") > 64 * 1024 {
        let chunk = Chunk::new(CHUNK, chunks.len() as u64);
        for address in chunk.physical(&pagemap) {
            assert_ne!(address, 0, "no physical addresses: CAP_SYS_ADMIN is needed");
            highest = highest.max(address);
            if address < 1 << 32 {
                below += 1;
            } else {
                above += 1;
            }
        }
        chunks.push(chunk);
    }
    let wrong: usize = chunks.iter().map(Chunk::wrong_marks).sum();
    json!({
        "total_kib": total,
        "pages_below_4g": below,
        "pages_above_4g": above,
        "highest_address": highest,
        "wrong_marks": wrong,
    })
}

/// Anonymous memory with a mark at the beginning and the end of each page.
struct Chunk {
    words: *mut u64,
    len: usize,
    number: u64,
}

impl Chunk {
    fn new(len: usize, number: u64) -> Self {
        let size = len.try_into().expect("a size");
        let flags = MapFlags::MAP_PRIVATE;
        // SAFETY: a new mapping at an address of the kernel's choice replaces no other.
        let start = unsafe { mmap_anonymous(None, size, ProtFlags::all(), flags) }.expect("mmap");
        let chunk = Self { words: start.as_ptr().cast(), len, number };
        for (at, mark) in chunk.marks() {
            let word = chunk.words.wrapping_add(at);
            // SAFETY: `marks` gives offsets inside the mapping, which is never unmapped, and is
            // aligned to a page.
            unsafe { word.write_volatile(mark) };
        }
        chunk
    }

    /// Offsets in words and the mark of each, different all over memory.
    fn marks(&self) -> impl Iterator<Item = (usize, u64)> + use<> {
        let number = self.number;
        let words = PAGE / 8;
        let places = (0..self.len / PAGE).flat_map(move |p| [p * words, p * words + words - 1]);
        places.map(move |at| (at, (number << 32 | at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }

    fn wrong_marks(&self) -> usize {
        let read = |at: usize| {
            let word = self.words.wrapping_add(at);
            // SAFETY: as in `new`.
            unsafe { word.read_volatile() }
        };
        self.marks().filter(|&(at, mark)| read(at) != mark).count()
    }

    fn physical(&self, pagemap: &File) -> Vec<u64> {
        let first = self.words as usize / PAGE;
        let mut entries = vec![0; self.len / PAGE * 8];
        pagemap.read_exact_at(&mut entries, first as u64 * 8).expect("/proc/self/pagemap");
        let words = entries.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().expect("8")));
        // Documentation/admin-guide/mm/pagemap.rst: bits 0-54 are the page frame number.
        words.map(|entry| (entry & ((1 << 55) - 1)) * PAGE as u64).collect()
    }
}

fn meminfo_kib(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").expect("/proc/meminfo");
    let line = text.lines().find(|l| l.starts_with(&format!("{name}:"))).expect("a line");
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
}

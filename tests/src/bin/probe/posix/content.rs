//! Reading and writing.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::num::NonZeroUsize;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::mman::{MapFlags, MsFlags, ProtFlags, mmap, msync, munmap};
use nix::unistd::{Whence, lseek};

use super::{OrSay, Outcome, another, fails, same};

const MIB: u64 = 1 << 20;

fn create(path: &Path) -> Result<File, String> {
    let mut options = File::options();
    options.create_new(true).read(true).write(true).open(path).or_say("create")
}

/// Two processes append; no line may be torn or overwritten.
pub(super) fn append(dir: &Path) -> Outcome {
    let path = dir.join("log");
    create(&path)?;
    let path_text = path.to_string_lossy();
    let writers = ["a", "b"].map(|mark| another(&["posix-append", &path_text, mark]));
    for writer in writers {
        let status = writer?.wait().or_say("another process")?;
        same("a writer succeeded", status.success(), true)?;
    }
    let text = fs::read_to_string(&path).or_say("read")?;
    let count = |mark: &str| text.lines().filter(|&line| line == mark.repeat(63)).count();
    same("whole lines", (text.len(), count("a"), count("b")), (64_000, 500, 500))
}

/// A mapping and its file have the same content.
pub(super) fn mmap_shared(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let file = create(&path)?;
    file.set_len(8192).or_say("ftruncate")?;
    let size = NonZeroUsize::new(8192).ok_or("0")?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice replaces no other.
    let mapped = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, &file, 0) };
    let mapped = mapped.or_say("mmap")?;
    let bytes: *mut u8 = mapped.as_ptr().cast();
    let (to_write, to_read) = (bytes.wrapping_add(5000), bytes.wrapping_add(6000));
    // SAFETY: the mapping is 8192 bytes long and mapped writable until munmap below.
    unsafe { to_write.write_volatile(b'm') };
    // SAFETY: the range is the whole mapping.
    unsafe { msync(mapped, 8192, MsFlags::MS_SYNC) }.or_say("msync")?;
    let mut byte = [0];
    File::open(&path).and_then(|f| f.read_exact_at(&mut byte, 5000)).or_say("read")?;
    same("byte written by the mapping", byte, *b"m")?;
    file.write_all_at(b"w", 6000).or_say("write")?;
    // SAFETY: the mapping is 8192 bytes long and mapped readable until munmap below.
    let seen = unsafe { to_read.read_volatile() };
    same("byte written by write(2)", seen, b'w')?;
    // SAFETY: the range is the whole mapping, and nothing points into it after this.
    unsafe { munmap(mapped, 8192) }.or_say("munmap")
}

pub(super) fn fsync(dir: &Path) -> Outcome {
    let mut file = create(&dir.join("file"))?;
    file.write_all(b"durable").or_say("write")?;
    file.sync_data().or_say("fdatasync")?;
    file.sync_all().or_say("fsync")?;
    File::open(dir).and_then(|d| d.sync_all()).or_say("fsync of a directory")?;
    let file = nix::unistd::syncfs(&file);
    file.or_say("syncfs")
}

/// A hole takes no room, reads as zeros, and is found by lseek(2).
pub(super) fn sparse(dir: &Path) -> Outcome {
    let file = create(&dir.join("file"))?;
    file.write_all_at(b"end", 1024 * MIB).or_say("write")?;
    let found = file.metadata().or_say("fstat")?;
    same("size", found.len(), 1024 * MIB + 3)?;
    same("takes less than a MiB", found.blocks() * 512 < MIB, true)?;
    let mut middle = [1; 64];
    file.read_exact_at(&mut middle, 512 * MIB).or_say("read of the hole")?;
    same("the hole", middle, [0; 64])?;
    let data = lseek(&file, 0, Whence::SeekData).or_say("SEEK_DATA")?;
    same("data begins at the last block", data, 1024 * MIB as i64)?;
    let hole = lseek(&file, 0, Whence::SeekHole).or_say("SEEK_HOLE")?;
    same("first hole", hole, 0)?;
    let past = lseek(&file, 2048 * MIB as i64, Whence::SeekData).map_err(Into::into);
    fails("SEEK_DATA past the end", past, libc::ENXIO)
}

pub(super) fn truncate(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, "0123456789").or_say("write")?;
    let file = File::options().read(true).write(true).open(&path).or_say("open")?;
    file.set_len(4).or_say("ftruncate")?;
    file.set_len(6).or_say("ftruncate")?;
    let mut bytes = Vec::new();
    (&file).read_to_end(&mut bytes).or_say("read")?;
    same("bytes", bytes.as_slice(), b"0123\0\0")?;
    File::create(&path).or_say("O_TRUNC")?;
    same("size after O_TRUNC", file.metadata().or_say("fstat")?.len(), 0)
}

pub(super) fn large_offsets(dir: &Path) -> Outcome {
    let file = create(&dir.join("file"))?;
    let at = 5 * 1024 * MIB;
    file.write_all_at(b"far", at).or_say("write beyond 4 GiB")?;
    let mut bytes = [0; 3];
    file.read_exact_at(&mut bytes, at).or_say("read beyond 4 GiB")?;
    same("bytes", &bytes, b"far")?;
    same("size", file.metadata().or_say("fstat")?.len(), at + 3)
}

pub(super) fn punch_hole(dir: &Path) -> Outcome {
    let file = create(&dir.join("file"))?;
    file.write_all_at(&vec![7; 4 * 65536], 0).or_say("write")?;
    let before = file.metadata().or_say("fstat")?.blocks();
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, flags, 65536, 65536).or_say("FALLOC_FL_PUNCH_HOLE")?;
    let mut bytes = vec![1; 3 * 65536];
    file.read_exact_at(&mut bytes, 0).or_say("read")?;
    same("bytes before the hole", bytes[65535], 7)?;
    same("the hole", bytes[65536..2 * 65536].iter().all(|&b| b == 0), true)?;
    same("bytes after the hole", bytes[2 * 65536], 7)?;
    same("fewer blocks", file.metadata().or_say("fstat")?.blocks() < before, true)
}

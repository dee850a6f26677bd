//! Loads the kernel into guest memory: its constant pages are mapped from the file, the rest is
//! read.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Address, GuestAddress};

use super::boot::BootError;
use super::layout::{self, PAGE_SIZE};
use crate::image::Chunked;
use crate::memory::GuestRam;

/// Length in bytes of an ELF header and of a program header (System V ABI, 64-bit objects).
const HEADER_LEN: usize = 64;
const PROGRAM_HEADER_LEN: usize = 56;

/// `e_machine` of AMD64 (System V ABI, AMD64 supplement, 4.1).
const EM_X86_64: u16 = 62;

/// `p_type` of a loadable segment, and the flag of a writable one (System V ABI, "Program Header").
const PT_LOAD: u32 = 1;
const PF_W: u32 = 2;

/// Place of the kernel in guest memory.
#[derive(Debug, Clone, Copy)]
pub struct Kernel {
    /// Guest physical address of the 64-bit entry point.
    pub entry: u64,
    /// First address behind the kernel, its zero-filled part included.
    pub end: u64,
}

/// Loads an ELF kernel at its physical addresses.
///
/// With `share`, whole pages of code and constants are mapped from the file, so all microVMs share
/// them. The guest gets its own copy of a page that it writes, as when it adapts code to the
/// processor.
///
/// # Errors
///
/// [`BootError::Kernel`], [`BootError::OtherMachine`] or [`BootError::Unshared`].
pub fn load(ram: &GuestRam, file: &mut File, path: &str, share: bool) -> Result<Kernel, BootError> {
    let mut header = [0; HEADER_LEN];
    let whole = file.read_exact_at(&mut header, 0).is_ok();
    // The loader does not check the architecture.
    if whole && header[..4] == *b"\x7fELF" && u16::from_le_bytes(at(&header, 18)) != EM_X86_64 {
        return Err(BootError::OtherMachine(path.to_owned()));
    }
    let mapped = if share { map(ram, file, &header) } else { Ok(Vec::new()) };
    let mut rest = Chunked::without(file, mapped.as_deref().unwrap_or_default());
    let loaded = Elf::load(ram.memory(), None, &mut rest, Some(GuestAddress(layout::HIMEM_START)))
        .map_err(|source| BootError::Kernel { path: path.to_owned(), source })?;
    // Reported only if the loader succeeds: a file that is not a kernel cannot be shared either.
    mapped.map_err(|source| BootError::Unshared { path: path.to_owned(), source })?;
    Ok(Kernel { entry: loaded.kernel_load.raw_value(), end: loaded.kernel_end })
}

/// Maps the constant segments of `file` into guest memory. Returns their parts of the file.
fn map(ram: &GuestRam, file: &File, header: &[u8; HEADER_LEN]) -> io::Result<Vec<Range<u64>>> {
    let segments = constant_segments(file, header);
    if segments.is_empty() {
        return Err(io::Error::other("no segment is constant and aligned to pages"));
    }
    let map = |segment: &Segment| {
        ram.map_file(segment.address, segment.len, file, segment.offset)?;
        Ok(segment.offset..segment.offset + segment.len as u64)
    };
    segments.iter().map(map).collect()
}

/// Whole pages of a file, and their guest address.
#[derive(Debug, PartialEq, Eq)]
struct Segment {
    offset: u64,
    address: u64,
    len: usize,
}

/// Returns the segments that are not writable and are aligned to pages in the file and in memory. A
/// file that is not a kernel has none here, and the loader reports the error.
fn constant_segments(file: &File, header: &[u8; HEADER_LEN]) -> Vec<Segment> {
    let (start, count) = (u64::from_le_bytes(at(header, 32)), u16::from_le_bytes(at(header, 56)));
    let file_len = file.metadata().map_or(0, |metadata| metadata.len());
    let segment = |number: u16| {
        let mut entry = [0; PROGRAM_HEADER_LEN];
        let skipped = u64::from(number) * PROGRAM_HEADER_LEN as u64;
        file.read_exact_at(&mut entry, start.checked_add(skipped)?).ok()?;
        let [kind, flags] = [0, 4].map(|from| u32::from_le_bytes(at(&entry, from)));
        let [offset, address, len] = [8, 24, 32].map(|from| u64::from_le_bytes(at(&entry, from)));
        let len = len & !(PAGE_SIZE - 1);
        let fits = kind == PT_LOAD
            && flags & PF_W == 0
            && (offset | address).is_multiple_of(PAGE_SIZE)
            && address >= layout::HIMEM_START
            // Pages behind the end of the file would be holes in guest memory.
            && len > 0
            && offset.checked_add(len)? <= file_len;
        fits.then_some(Segment { offset, address, len: usize::try_from(len).ok()? })
    };
    (0..count).filter_map(segment).collect()
}

/// Returns the bytes of a number in a header that is long enough.
fn at<const N: usize>(header: &[u8], from: usize) -> [u8; N] {
    std::array::from_fn(|index| header[from + index])
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::Bytes;

    use super::*;

    /// A kernel whose segments have these flags. Each segment is 2.5 pages long.
    fn kernel(flags: &[u32]) -> (File, Vec<u8>) {
        const LEN: u64 = 2 * PAGE_SIZE + PAGE_SIZE / 2;
        let mut bytes = vec![0; HEADER_LEN];
        bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        bytes[16..20].copy_from_slice(&[2, 0, EM_X86_64 as u8, 0]);
        bytes[24..32].copy_from_slice(&layout::HIMEM_START.to_le_bytes());
        bytes[32] = HEADER_LEN as u8;
        bytes[54] = PROGRAM_HEADER_LEN as u8;
        bytes[56] = flags.len() as u8;
        for (number, flags) in flags.iter().enumerate() {
            let offset = PAGE_SIZE * (1 + 4 * number as u64);
            bytes.extend(PT_LOAD.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            for value in [offset, 0, layout::HIMEM_START + offset, LEN, LEN, PAGE_SIZE] {
                bytes.extend(value.to_le_bytes());
            }
        }
        let start = bytes.len();
        bytes.resize((PAGE_SIZE * (1 + 4 * flags.len() as u64)) as usize, 0);
        for (number, byte) in bytes.iter_mut().enumerate().skip(start) {
            *byte = (number / 7) as u8;
        }
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        (file, bytes)
    }

    fn loaded(ram: &GuestRam, offset: usize, len: usize) -> Vec<u8> {
        let mut found = vec![0; len];
        let address = GuestAddress(layout::HIMEM_START + offset as u64);
        ram.memory().read_slice(&mut found, address).unwrap();
        found
    }

    #[test]
    fn what_is_mapped_and_what_is_read_are_there() {
        let (mut file, bytes) = kernel(&[5, 6, 4]);
        let header = bytes[..HEADER_LEN].try_into().unwrap();
        let page = |number: usize| number * PAGE_SIZE as usize;
        let segment = |number: usize| Segment {
            offset: page(number) as u64,
            address: layout::HIMEM_START + page(number) as u64,
            len: page(2),
        };
        assert_eq!(constant_segments(&file, header), [segment(1), segment(9)]);
        let [unshared, ram, other] = [(); 3].map(|()| GuestRam::new(64).unwrap());
        for (ram, share) in [(&unshared, false), (&ram, true)] {
            let kernel = load(ram, &mut file, "kernel", share).unwrap();
            assert_eq!(kernel.entry, layout::HIMEM_START);
            for start in [1, 5, 9].map(page) {
                let len = page(2) + page(1) / 2;
                assert!(loaded(ram, start, len) == bytes[start..start + len]);
            }
        }
        // A guest gets its own copy of a page that it writes.
        load(&other, &mut file, "kernel", true).unwrap();
        let address = GuestAddress(layout::HIMEM_START + PAGE_SIZE);
        ram.memory().write_slice(b"changed", address).unwrap();
        assert_eq!(loaded(&ram, page(1), 7), b"changed");
        assert_eq!(loaded(&other, page(1), 7), bytes[page(1)..page(1) + 7]);
        let mut kept = [0; 7];
        file.read_exact_at(&mut kept, PAGE_SIZE).unwrap();
        assert_eq!(kept, bytes[page(1)..page(1) + 7]);
    }

    #[test]
    fn a_kernel_that_changes_all_of_itself_is_not_shared() {
        let (mut file, _) = kernel(&[7]);
        let ram = GuestRam::new(64).unwrap();
        load(&ram, &mut file, "kernel", false).unwrap();
        let error = load(&ram, &mut file, "kernel", true).unwrap_err();
        assert!(matches!(error, BootError::Unshared { .. }), "{error}");
    }

    #[test]
    fn what_is_cut_short_is_not_mapped() {
        let (mut file, bytes) = kernel(&[5]);
        let header = bytes[..HEADER_LEN].try_into().unwrap();
        file.set_len(2 * PAGE_SIZE).unwrap();
        assert_eq!(constant_segments(&file, header), []);
        let error = load(&GuestRam::new(64).unwrap(), &mut file, "kernel", true).unwrap_err();
        assert!(matches!(error, BootError::Kernel { .. }), "{error}");
        let huge = u64::MAX.to_le_bytes();
        for field in [8, 24, 32] {
            let (file, bytes) = kernel(&[5]);
            file.write_all_at(&huge, (HEADER_LEN + field) as u64).unwrap();
            let header = bytes[..HEADER_LEN].try_into().unwrap();
            assert_eq!(constant_segments(&file, header), []);
        }
    }
}

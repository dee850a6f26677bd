//! Guest RAM: its host mappings, and their guest physical addresses.

use std::error::Error;
use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use vm_memory::{
    Address, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MemoryRegionAddress, MmapRegion,
};

use crate::arch::x86_64::layout::{MMIO_GAP_END, MMIO_GAP_START};

/// Guest memory for devices. Clones share the mappings.
pub type GuestMemoryMap = GuestMemoryMmap<()>;

/// Errors of guest RAM.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host has no address space left.
    #[error("cannot map {size_mib} MiB of guest memory: {source}; lower the sandbox's memory size")]
    Map {
        /// Size of guest RAM in MiB.
        size_mib: u64,
        /// Error of `mmap` or of the region list.
        source: Box<dyn Error + Send + Sync>,
    },
    /// Data of the VMM does not fit in guest memory.
    #[error("the {what} does not fit in guest memory: {source}")]
    Access {
        /// Name of the data.
        what: &'static str,
        /// The failed access.
        source: GuestMemoryError,
    },
}

/// All RAM of the guest, in private mappings. The host allocates a page at the first access. All
/// RAM is anonymous, except for files mapped by [`Self::map_file`].
#[derive(Debug, Clone)]
pub struct GuestRam {
    memory: GuestMemoryMap,
}

impl GuestRam {
    /// Maps `size_mib` MiB, in two parts if they reach the hole below 4 GiB.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Map`] when the host has no address space left.
    pub fn new(size_mib: u64) -> Result<Self, MemoryError> {
        let failed = |source: Box<dyn Error + Send + Sync>| MemoryError::Map { size_mib, source };
        let mut regions = Vec::new();
        for (start, len) in ranges(size_mib << 20) {
            let host = map_aligned(len).map_err(|e| failed(e.into()))?;
            // SAFETY: the mapping is new, `len` bytes long, and never unmapped: the process lives
            // no longer than its microVM.
            let region = unsafe {
                MmapRegion::build_raw(host.as_ptr().cast(), len, PROTECTION.bits(), FLAGS.bits())
            }
            .map_err(|e| failed(e.into()))?;
            let region = GuestRegionMmap::new(region, start)
                .ok_or_else(|| failed("the address space ends before the memory".into()))?;
            regions.push(region);
        }
        let memory = GuestMemoryMap::from_regions(regions).map_err(|e| failed(e.into()))?;
        Ok(Self { memory })
    }

    /// Returns the mappings.
    pub fn memory(&self) -> &GuestMemoryMap {
        &self.memory
    }

    /// Maps `len` bytes of `file` from `offset` at the guest address `start`. All microVMs share
    /// the pages, until a guest gets its own copy of a page that it writes. All three numbers are
    /// multiples of 4096.
    ///
    /// The file must keep its length, or the guest loses pages. A file replaced by a rename keeps
    /// it.
    ///
    /// # Errors
    ///
    /// When the range is not guest memory, or the file's file system does not support mappings.
    pub fn map_file(&self, start: u64, len: usize, file: &File, offset: u64) -> io::Result<()> {
        let slice = self.memory.get_slice(GuestAddress(start), len).map_err(io::Error::other)?;
        let target = slice.ptr_guard_mut().as_ptr().addr();
        let (Some(target), Some(len), Ok(offset)) =
            (NonZeroUsize::new(target), NonZeroUsize::new(len), offset.try_into())
        else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let flags = FLAGS.union(MapFlags::MAP_FIXED);
        // SAFETY: the range is within one mapping of guest RAM, which stays mapped as long as the
        // process. Only volatile accesses through guest addresses use it, and they allow other
        // pages in its place.
        let mapped = unsafe { mmap(Some(target), len, PROTECTION, flags, file, offset)? };
        // SAFETY: the call changes the content of core dumps, not the memory.
        unsafe { madvise(mapped, len.get(), MmapAdvise::MADV_DONTDUMP)? };
        Ok(())
    }

    /// Returns the first address behind the RAM below 4 GiB.
    pub fn low_end(&self) -> u64 {
        self.memory
            .find_region(GuestAddress(0))
            .map_or(0, |region| region.last_addr().raw_value() + 1)
    }

    /// Returns the parts of guest RAM.
    pub fn parts(&self) -> Vec<RamPart> {
        self.memory
            .iter()
            .filter_map(|region| {
                let host = region.get_host_address(MemoryRegionAddress(0)).ok()?;
                Some(RamPart {
                    guest_addr: region.start_addr().raw_value(),
                    len: region.len(),
                    host_addr: host as u64,
                })
            })
            .collect()
    }
}

/// One contiguous part of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamPart {
    /// Guest physical address of the first byte.
    pub guest_addr: u64,
    /// Length in bytes.
    pub len: u64,
    /// Address of the first byte in this process.
    pub host_addr: u64,
}

/// Size of a huge page of x86-64 in bytes.
const HUGE_PAGE_SIZE: usize = 2 << 20;

const PROTECTION: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

/// Without a reservation: a guest gets more memory than it uses. The host's owner chooses the
/// policy for overcommitting.
const FLAGS: MapFlags = MapFlags::MAP_PRIVATE.union(MapFlags::MAP_NORESERVE);

/// Maps `len` bytes at a multiple of [`HUGE_PAGE_SIZE`]. The guest addresses are multiples too.
/// Only then can KVM map a huge page of the host as a huge page of the guest. That saves a fault
/// for each of its 512 small pages.
fn map_aligned(len: usize) -> nix::Result<NonNull<c_void>> {
    let (Some(reserved), Some(_)) =
        (len.checked_add(HUGE_PAGE_SIZE).and_then(NonZeroUsize::new), NonZeroUsize::new(len))
    else {
        return Err(nix::errno::Errno::EINVAL);
    };
    // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
    let start = unsafe { mmap_anonymous(None, reserved, PROTECTION, FLAGS)? };
    let head = start.align_offset(HUGE_PAGE_SIZE);
    // SAFETY: `head` is less than a huge page, and the mapping is longer than that.
    let aligned = unsafe { start.byte_add(head) };
    if head > 0 {
        // SAFETY: the range is the first `head` bytes of the new mapping, which has no user yet.
        unsafe { munmap(start, head)? };
    }
    // SAFETY: `head` is less than a huge page, so the mapping goes on behind the `len` bytes that
    // are kept.
    let tail = unsafe { aligned.byte_add(len) };
    // SAFETY: the range is the rest of the same mapping.
    unsafe { munmap(tail, HUGE_PAGE_SIZE - head)? };
    // SAFETY: the call changes the content of core dumps, not the memory.
    unsafe { madvise(aligned, len, MmapAdvise::MADV_DONTDUMP)? };
    // Many hosts give huge pages only on request (`madvise` in
    // /sys/kernel/mm/transparent_hugepage/enabled). A kernel without huge pages refuses, which is
    // no error.
    //
    // SAFETY: the call changes how the memory is mapped, not its content.
    let _ = unsafe { madvise(aligned, len, MmapAdvise::MADV_HUGEPAGE) };
    Ok(aligned)
}

fn ranges(size: u64) -> Vec<(GuestAddress, usize)> {
    let low = size.min(MMIO_GAP_START);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if size > low {
        ranges.push((GuestAddress(MMIO_GAP_END), (size - low) as usize));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_pages_of_host_and_guest_coincide() {
        let ram = GuestRam::new(65).unwrap();
        for part in ram.parts() {
            assert_eq!((part.host_addr - part.guest_addr) % HUGE_PAGE_SIZE as u64, 0);
        }
        let last = GuestAddress((65 << 20) - 8);
        vm_memory::Bytes::write_obj(ram.memory(), 7u64, last).unwrap();
        assert_eq!(vm_memory::Bytes::read_obj::<u64>(ram.memory(), last).unwrap(), 7);
    }

    #[test]
    fn guest_memory_is_in_no_core_dump() {
        let ram = GuestRam::new(64).unwrap();
        let [part] = ram.parts()[..] else { panic!("one part") };
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mapping = smaps.split_once(&format!("{:x}-", part.host_addr)).unwrap().1;
        let flags = mapping.lines().find_map(|line| line.strip_prefix("VmFlags: ")).unwrap();
        assert!(flags.split_whitespace().any(|flag| flag == "dd"), "{flags}");
    }

    #[test]
    fn ram_goes_around_the_hole() {
        assert_eq!(ranges(64 << 20), [(GuestAddress(0), 64 << 20)]);
        assert_eq!(ranges(3 << 30), [(GuestAddress(0), 3 << 30)]);
        assert_eq!(ranges(4 << 30), [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 1 << 30)]);
    }
}

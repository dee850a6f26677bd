//! Guest RAM: host mappings, and where they are in the guest's physical address space.

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

/// Guest memory as devices see it. Clones share the mappings.
pub type GuestMemoryMap = GuestMemoryMmap<()>;

/// Something went wrong with guest RAM.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host gave no address space.
    #[error("mapping {size_mib} MiB of guest memory: {source}; lower the sandbox's memory size")]
    Map {
        /// How much was asked for.
        size_mib: u64,
        /// What `mmap` or the region list said.
        source: Box<dyn Error + Send + Sync>,
    },
    /// What the VMM places there does not fit.
    #[error("the {what} does not fit in guest memory: {source}")]
    Access {
        /// What was to be written.
        what: &'static str,
        /// Which access failed.
        source: GuestMemoryError,
    },
}

/// All RAM of the guest, private, given by the host page by page as it is touched. All of
/// it is anonymous except for files that [`Self::map_file`] has put there.
#[derive(Debug, Clone)]
pub struct GuestRam {
    memory: GuestMemoryMap,
}

impl GuestRam {
    /// Maps `size_mib` MiB, in two parts when it reaches the hole below 4 GiB.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Map`] when the host has no room.
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

    /// The mappings.
    pub fn memory(&self) -> &GuestMemoryMap {
        &self.memory
    }

    /// Shows `len` bytes of `file` from `offset` at the guest address `start`: pages that all microVMs share until
    /// the guest writes to one, which is a copy then. All three numbers are multiples of 4096.
    ///
    /// The file has to keep its length, or the guest loses pages; what is replaced by a rename does.
    ///
    /// # Errors
    ///
    /// If that is no guest memory, or the file's own file system does not map files.
    pub fn map_file(&self, start: u64, len: usize, file: &File, offset: u64) -> io::Result<()> {
        let slice = self.memory.get_slice(GuestAddress(start), len).map_err(io::Error::other)?;
        let target = slice.ptr_guard_mut().as_ptr().addr();
        let (Some(target), Some(len), Ok(offset)) =
            (NonZeroUsize::new(target), NonZeroUsize::new(len), offset.try_into())
        else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let flags = FLAGS.union(MapFlags::MAP_FIXED);
        // SAFETY: the range is within one mapping of guest RAM, which stays as long as the process and which
        // nothing but volatile accesses through guest addresses uses; other pages in its place do them no harm.
        let mapped = unsafe { mmap(Some(target), len, PROTECTION, flags, file, offset)? };
        // SAFETY: it changes what a core dump contains, not the memory.
        unsafe { madvise(mapped, len.get(), MmapAdvise::MADV_DONTDUMP)? };
        Ok(())
    }

    /// First address behind the RAM below 4 GiB.
    pub fn low_end(&self) -> u64 {
        self.memory
            .find_region(GuestAddress(0))
            .map_or(0, |region| region.last_addr().raw_value() + 1)
    }

    /// Each part: guest address, length in bytes, and host address.
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
    /// Guest physical address of its first byte.
    pub guest_addr: u64,
    /// Its length in bytes.
    pub len: u64,
    /// Address of its first byte in this process.
    pub host_addr: u64,
}

/// A huge page of x86-64, in bytes.
const HUGE_PAGE_SIZE: usize = 2 << 20;

const PROTECTION: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

/// Not reserved: a guest is given more than it uses, and the host's policy for overcommitting is
/// for its owner to choose.
const FLAGS: MapFlags = MapFlags::MAP_PRIVATE.union(MapFlags::MAP_NORESERVE);

/// Maps `len` bytes at a multiple of [`HUGE_PAGE_SIZE`]. Guest addresses are multiples of it as
/// well, and only then can KVM map a huge page of the host as a huge page of the guest, which
/// saves it a fault for each of the 512 small ones.
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
        // SAFETY: the first `head` bytes of a mapping that nobody has been told of.
        unsafe { munmap(start, head)? };
    }
    // SAFETY: the mapping goes on behind the `len` bytes that are kept, as `head` is less than a
    // huge page.
    let tail = unsafe { aligned.byte_add(len) };
    // SAFETY: the rest of the same mapping.
    unsafe { munmap(tail, HUGE_PAGE_SIZE - head)? };
    // SAFETY: it changes what a core dump contains, not the memory.
    unsafe { madvise(aligned, len, MmapAdvise::MADV_DONTDUMP)? };
    // Many hosts give huge pages to whoever asks only (`madvise` in
    // /sys/kernel/mm/transparent_hugepage/enabled). A host's kernel that has none refuses, and then there is
    // nothing to be had.
    // SAFETY: it changes how the memory is mapped, not what is in it.
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

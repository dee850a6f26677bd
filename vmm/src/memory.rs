//! Guest RAM: host mappings, and where they are in the guest's physical address space.

use vm_memory::{
    Address, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
    MemoryRegionAddress, mmap::FromRangesError,
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
        source: FromRangesError,
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

/// All RAM of the guest, anonymous and private, given by the host page by page as it is touched.
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
        let ranges = ranges(size_mib << 20);
        let memory = GuestMemoryMap::from_ranges(&ranges)
            .map_err(|source| MemoryError::Map { size_mib, source })?;
        Ok(Self { memory })
    }

    /// The mappings.
    pub fn memory(&self) -> &GuestMemoryMap {
        &self.memory
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
    fn ram_goes_around_the_hole() {
        assert_eq!(ranges(64 << 20), [(GuestAddress(0), 64 << 20)]);
        assert_eq!(ranges(3 << 30), [(GuestAddress(0), 3 << 30)]);
        assert_eq!(ranges(4 << 30), [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 1 << 30)]);
    }
}

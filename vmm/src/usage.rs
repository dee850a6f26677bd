//! Resource use of a microVM: memory of this process, and exits counted by KVM.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl;

use crate::memory::RamPart;

#[allow(missing_docs)]
mod request {
    // include/uapi/linux/kvm.h
    vmm_sys_util::ioctl_io_nr!(KVM_GET_STATS_FD, kvm_bindings::KVMIO, 0xce);
}

/// Resident memory of this process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Resident {
    /// Guest memory, in KiB.
    pub guest_kib: u64,
    /// Other memory, in KiB.
    pub overhead_kib: u64,
}

/// Meter of [`Resident`]. It works after `/proc` is out of sight.
pub struct MemoryMeter {
    smaps: File,
    ram: Vec<RamPart>,
}

impl MemoryMeter {
    /// Creates a meter that counts `ram` as guest memory.
    ///
    /// # Errors
    ///
    /// When there is no `/proc`.
    pub fn new(ram: Vec<RamPart>) -> io::Result<Self> {
        Ok(Self { smaps: File::open("/proc/self/smaps")?, ram })
    }

    /// Returns the memory that is resident now. The kernel walks the page tables, so the call is
    /// not for a hot path.
    pub fn read(&mut self) -> io::Result<Resident> {
        let mut text = String::new();
        self.smaps.seek(SeekFrom::Start(0))?;
        self.smaps.read_to_string(&mut text)?;
        Ok(sum(&text, &self.ram))
    }
}

fn sum(smaps: &str, ram: &[RamPart]) -> Resident {
    let mut resident = Resident::default();
    let mut in_guest = false;
    for line in smaps.lines() {
        if let Some(kib) = line.strip_prefix("Rss:") {
            let kib: u64 = kib.trim().trim_end_matches(" kB").parse().unwrap_or(0);
            *if in_guest { &mut resident.guest_kib } else { &mut resident.overhead_kib } += kib;
        } else if let Some(start) =
            line.split_once('-').and_then(|(start, _)| u64::from_str_radix(start, 16).ok())
        {
            in_guest = ram.iter().any(|p| (p.host_addr..p.host_addr + p.len).contains(&start));
        }
    }
    resident
}

/// KVM's counters of one vCPU's exits, in total and by kind (KVM API, 4.133 `KVM_GET_STATS_FD`).
/// KVM's other counters are of its work at an exit, or of time.
pub struct VcpuStats {
    data: File,
    counters: Vec<(String, u64)>,
}

const HEADER_LEN: usize = 24;
const DESCRIPTOR_LEN: usize = 16;
/// Type and unit in the flags of a descriptor. 0 is a cumulative number without a unit.
const TYPE_AND_UNIT: u32 = 0xff;
/// Bound of the number of descriptors and of a name's length, above those of any kernel.
const SANE: u32 = 4096;

impl VcpuStats {
    /// Opens the counters of `vcpu`.
    ///
    /// # Errors
    ///
    /// On kernels before 5.14, which have none.
    pub fn open(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: the request takes no argument and returns a new descriptor or -1.
        let fd = unsafe { ioctl(vcpu, request::KVM_GET_STATS_FD()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and has no other owner.
        let data = unsafe { File::from_raw_fd(fd) };
        let mut header = [0u8; HEADER_LEN];
        data.read_exact_at(&mut header, 0)?;
        let field = |n: usize| word(&header, n * 4);
        let (name_len, count) = (field(1), field(2));
        let (descriptors_at, data_at) = (u64::from(field(4)), u64::from(field(5)));
        if name_len > SANE || count > SANE {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let stride = DESCRIPTOR_LEN + name_len as usize;
        let mut descriptors = vec![0u8; stride * count as usize];
        data.read_exact_at(&mut descriptors, descriptors_at)?;
        let counters = descriptors
            .chunks_exact(stride)
            .filter_map(exit_counter)
            .map(|(name, offset)| (name, data_at + u64::from(offset)))
            .collect();
        Ok(Self { data, counters })
    }

    /// Adds the counters that are not zero to `sums`.
    pub fn add_to(&self, sums: &mut BTreeMap<String, u64>) {
        for (name, at) in &self.counters {
            let mut value = [0u8; 8];
            if self.data.read_exact_at(&mut value, *at).is_ok() && value != [0; 8] {
                *sums.entry(name.clone()).or_default() += u64::from_le_bytes(value);
            }
        }
    }
}

/// Returns name and offset of a counter, if it counts exits. `descriptor` is a `struct
/// kvm_stats_desc`.
fn exit_counter(descriptor: &[u8]) -> Option<(String, u32)> {
    let (head, name) = descriptor.split_at_checked(DESCRIPTOR_LEN)?;
    let name = name.split(|b| *b == 0).next().unwrap_or_default();
    let is_one_number = head[6..8] == [1, 0];
    let counts_exits = name == b"exits" || name.ends_with(b"_exits");
    (word(head, 0) & TYPE_AND_UNIT == 0 && is_one_number && counts_exits)
        .then(|| (format!("kvm:{}", String::from_utf8_lossy(name)), word(head, 8)))
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_told_from_the_rest() {
        let smaps = "\
00400000-00500000 r-xp 00000000 08:01 1 /x\nSize: 1024 kB\nRss:  300 kB\nPss: 1 kB\n\
7f0000000000-7f0040000000 rw-p 00000000 00:00 0\nRss:   7000 kB\n\
7f0040000000-7f0040001000 rw-p 00000000 00:00 0\nRss:      4 kB\n";
        let ram = [RamPart { guest_addr: 0, len: 0x4000_0000, host_addr: 0x7f00_0000_0000 }];
        assert_eq!(sum(smaps, &ram), Resident { guest_kib: 7000, overhead_kib: 304 });
    }

    #[test]
    fn only_counts_of_exits_are_taken() {
        let counter = |flags: u32, size: u16, name: &[u8]| {
            let mut descriptor = flags.to_le_bytes().to_vec();
            descriptor.extend([0, 0]);
            descriptor.extend(size.to_le_bytes());
            descriptor.extend(40u32.to_le_bytes());
            descriptor.extend([0; 4]);
            descriptor.extend(name);
            exit_counter(&descriptor)
        };
        assert_eq!(counter(0, 1, b"exits\0\0"), Some(("kvm:exits".to_owned(), 40)));
        assert_eq!(counter(0, 1, b"io_exits\0"), Some(("kvm:io_exits".to_owned(), 40)));
        // KVM_STATS_TYPE_INSTANT, KVM_STATS_UNIT_SECONDS, a histogram, and a counter of something
        // else.
        assert_eq!(counter(0x01, 1, b"exits\0"), None);
        assert_eq!(counter(0x20, 1, b"wait_exits\0"), None);
        assert_eq!(counter(0, 20, b"exits\0"), None);
        assert_eq!(counter(0, 1, b"fpu_reload\0"), None);
        assert_eq!(exit_counter(b"short"), None);
    }
}

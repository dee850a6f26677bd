//! Options of a lab, and the number of labs that this machine can run at the same time.

use std::fs;
use std::thread;

/// Options of a lab.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LabOptions {
    /// Counts instructions: guest time advances by 1 ms per million executed, on one processor.
    pub(crate) count: bool,
    /// Number of processors; one when counting.
    ///
    /// With several processors QEMU's emulation is not exact. About one in some hundred microVMs
    /// then misbehaves.
    pub(crate) cpus: usize,
    /// Memory in MiB.
    pub(crate) memory_mib: u64,
}

impl Default for LabOptions {
    fn default() -> Self {
        Self { count: false, cpus: 1, memory_mib: (total_mib() / 2).clamp(2048, MOST_MIB) }
    }
}

impl LabOptions {
    /// Number of labs for `jobs` jobs that this machine can run in parallel, and their options.
    pub(crate) fn side_by_side(jobs: usize) -> (usize, Self) {
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let (labs, memory_mib) = share(cpus.min(jobs), total_mib());
        (labs, Self { count: false, cpus: 1, memory_mib })
    }

    /// Size in MiB of QEMU's buffer for translated code.
    ///
    /// A microVM with its own copy of the kernel adds 50 MiB: QEMU translates each copy anew. When
    /// the buffer is full, QEMU discards all of it. QEMU allows at most 2 GiB
    /// (`MAX_CODE_GEN_BUFFER_SIZE`).
    pub(super) fn translated_mib(&self) -> u64 {
        (self.memory_mib / 4).clamp(512, 2047)
    }
}

/// Least memory in MiB of a lab that runs all tests. Some tests boot a guest of 4 GiB.
const TEST_MIB: u64 = 6 * 1024;

/// Largest useful memory of a lab in MiB.
const MOST_MIB: u64 = 8 * 1024;

/// Number of labs for `cpus` processors and `total_mib` MiB of memory, and the MiB of each lab.
///
/// A lab takes memory from the host only when it uses it, so together the labs may have all of it.
fn share(cpus: usize, total_mib: u64) -> (usize, u64) {
    let room = usize::try_from(total_mib / TEST_MIB).unwrap_or(usize::MAX);
    let labs = cpus.min(room).clamp(1, 4);
    (labs, (total_mib / labs as u64).min(MOST_MIB))
}

/// This machine's memory in MiB.
fn total_mib() -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total_kib = info
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|number| number.trim().parse::<u64>().ok());
    total_kib.map_or(MOST_MIB, |kib| kib / 1024)
}

#[cfg(test)]
mod tests {
    use super::share;

    #[test]
    fn labs_have_room_for_a_guest_of_4_gib() {
        assert_eq!(share(2, 24_000), (2, 8192));
        assert_eq!(share(8, 15_900), (2, 7950));
        assert_eq!(share(8, 64_000), (4, 8192));
        assert_eq!(share(4, 7_900), (1, 7900));
        assert_eq!(share(0, 3_900), (1, 3900));
    }
}

//! Settings of the guests of the file benchmark, the same for Isopod and QEMU.

/// Memory of the guest in MiB.
pub(super) const MEMORY_MIB: u64 = 1024;

/// Mount point of the volume: an empty directory of every Debian tree.
pub(super) const VOLUME: &str = "/mnt";

/// Path of the program that does the work, in the guest.
pub(super) const PROGRAM: &str = "/mnt/isopod-bench";

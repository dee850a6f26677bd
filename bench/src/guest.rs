//! Settings of the guest kernel, the same for Isopod's guest and QEMU's guest.

/// Kernel parameters of the guests in the net and file benchmarks: an idle guest keeps its tick.
///
/// The lab's emulated processor can lose a wakeup. An idle guest without a tick would then sleep
/// until another interrupt.
pub(crate) const KERNEL_PARAMS: &str = "nohz=off";

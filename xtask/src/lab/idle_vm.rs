//! A virtual machine that never runs and lives as long as the lab.
//!
//! KVM patches its own and the scheduler's code with the first virtual machine or local APIC, and
//! again when the last one is gone (`preempt_notifier_key`, `kvm_has_noapic_vcpu`). QEMU's
//! multi-threaded TCG can lose the last step of a patch if another processor executes the code
//! meanwhile. The other processor then takes the breakpoint of an earlier step for ever, with a run
//! queue locked. While the idle machine exists, nothing is patched.

use std::fs::File;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::libc::{self, c_ulong};

// include/uapi/linux/kvm.h
const KVM_CREATE_VM: c_ulong = 0xae01;
const KVM_CREATE_VCPU: c_ulong = 0xae41;
const KVM_CREATE_IRQCHIP: c_ulong = 0xae60;

/// The descriptors of the machine. It exists until they are closed.
#[derive(Debug)]
pub(super) struct IdleVm {
    _vcpu: OwnedFd,
    _vm: OwnedFd,
}

impl IdleVm {
    /// Makes the machine.
    pub(super) fn new() -> Result<Self> {
        let kvm = File::open("/dev/kvm").context("cannot open /dev/kvm")?;
        let vm = owned(ioctl(kvm.as_raw_fd(), KVM_CREATE_VM).context("KVM_CREATE_VM")?);
        ioctl(vm.as_raw_fd(), KVM_CREATE_IRQCHIP).context("KVM_CREATE_IRQCHIP")?;
        let vcpu = owned(ioctl(vm.as_raw_fd(), KVM_CREATE_VCPU).context("KVM_CREATE_VCPU")?);
        Ok(Self { _vcpu: vcpu, _vm: vm })
    }
}

fn ioctl(fd: RawFd, request: c_ulong) -> nix::Result<RawFd> {
    // SAFETY: the three requests take a number as their argument, or nothing, and no pointer.
    Errno::result(unsafe { libc::ioctl(fd, request, 0) })
}

fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor, and nothing else knows of it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

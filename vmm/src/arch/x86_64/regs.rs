//! The registers of a vCPU at boot. [`super::state`] has those of a vCPU that has run.

use kvm_bindings::{
    Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::layout;
use crate::memory::{GuestRam, MemoryError};

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

const LAPIC_LVT_LINT0: usize = 0x350;
const LAPIC_LVT_LINT1: usize = 0x360;
const DELIVERY_NMI: u32 = 4;
const DELIVERY_EXTINT: u32 = 7;

/// Returns a GDT descriptor with a flat 4 GiB limit (SDM 3, 3.4.5). `flags` holds the access byte
/// in its low bits and the granularity nibble above.
const fn flat_descriptor(flags: u16) -> u64 {
    let flags = flags as u64;
    0xffff | ((flags & 0xff) << 40) | (0xf << 48) | ((flags & 0xf000) << 40)
}

// Linux's __BOOT_CS is selector 0x10 and __BOOT_DS is 0x18 (Documentation/arch/x86/boot.rst,
// "64-bit boot protocol").
const GDT: [u64; 4] = [0, 0, flat_descriptor(0xa09b), flat_descriptor(0xc093)];
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;

/// The registers that KVM gets before a vCPU runs.
#[derive(Debug, Clone)]
pub struct VcpuRegs {
    /// General registers.
    pub regs: kvm_regs,
    /// Segments and control registers.
    pub sregs: kvm_sregs,
    /// Floating point registers.
    pub fpu: kvm_fpu,
    /// Local APIC page.
    pub lapic: kvm_lapic_state,
    /// Model-specific registers.
    pub msrs: Vec<kvm_msr_entry>,
}

impl VcpuRegs {
    /// Returns the state of vCPU `index` at power-on. The first vCPU enters the kernel at `entry`
    /// by the Linux 64-bit boot protocol. The others wait until the first starts them.
    pub fn at_boot(vcpu: &VcpuFd, index: u8, entry: u64) -> Result<Self, kvm_ioctls::Error> {
        let mut sregs = vcpu.get_sregs()?;
        let mut regs = kvm_regs { rflags: 2, ..Default::default() };
        if index == 0 {
            regs.rip = entry;
            regs.rsi = layout::ZERO_PAGE_START;
            regs.rsp = layout::BOOT_STACK_POINTER;
            regs.rbp = layout::BOOT_STACK_POINTER;
            enter_long_mode(&mut sregs);
        }
        let mut lapic = vcpu.get_lapic()?;
        set_delivery_mode(&mut lapic, LAPIC_LVT_LINT0, DELIVERY_EXTINT);
        set_delivery_mode(&mut lapic, LAPIC_LVT_LINT1, DELIVERY_NMI);
        // x87 control word and MXCSR after FNINIT and reset (SDM 1, 8.1.5 and 10.2.3).
        let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
        let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
        let msrs = vec![
            msr(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
            msr(MSR_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
        ];
        Ok(Self { regs, sregs, fpu, lapic, msrs })
    }

    /// Passes the registers to KVM.
    pub fn apply(&self, vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
        let msrs =
            Msrs::from_entries(&self.msrs).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
        if vcpu.set_msrs(&msrs)? != self.msrs.len() {
            return Err(kvm_ioctls::Error::new(libc::EINVAL));
        }
        vcpu.set_sregs(&self.sregs)?;
        vcpu.set_regs(&self.regs)?;
        vcpu.set_fpu(&self.fpu)?;
        vcpu.set_lapic(&self.lapic)
    }
}

/// Writes the descriptor and page tables for [`VcpuRegs::at_boot`]. The page tables map the first
/// GiB one to one, in pages of 2 MiB.
pub fn write_tables(ram: &GuestRam) -> Result<(), MemoryError> {
    const PRESENT_WRITABLE: u64 = 0x3;
    const LARGE_PAGE: u64 = 0x80;
    let write = |address: u64, entries: &[u64]| {
        let bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_le_bytes()).collect();
        ram.memory()
            .write_slice(&bytes, GuestAddress(address))
            .map_err(|source| MemoryError::Access { what: "boot tables", source })
    };
    write(layout::BOOT_GDT_START, &GDT)?;
    write(layout::PML4_START, &[layout::PDPT_START | PRESENT_WRITABLE])?;
    write(layout::PDPT_START, &[layout::PD_START | PRESENT_WRITABLE])?;
    let directory: Vec<u64> =
        (0..512u64).map(|n| (n << 21) | PRESENT_WRITABLE | LARGE_PAGE).collect();
    write(layout::PD_START, &directory)
}

fn enter_long_mode(sregs: &mut kvm_sregs) {
    let code = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: BOOT_CS,
        type_: 0xb, // execute, read, accessed
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: BOOT_DS, type_: 0x3, db: 1, l: 0, ..code };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // In long mode the task register must hold a busy 64-bit TSS, although nothing uses it.
    sregs.tr = kvm_segment { limit: 0x67, type_: 0xb, present: 1, ..Default::default() };
    sregs.gdt.base = layout::BOOT_GDT_START;
    sregs.gdt.limit = (size_of_val(&GDT) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = layout::PML4_START;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

/// Sets bits 8 to 10 of a local vector table register (SDM 3, 11.5.1).
fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let mut bytes = [0u8; 4];
    for (to, from) in bytes.iter_mut().zip(&lapic.regs[register..register + 4]) {
        *to = *from as u8;
    }
    let value = (u32::from_le_bytes(bytes) & !0x700) | (mode << 8);
    for (to, from) in lapic.regs[register..register + 4].iter_mut().zip(value.to_le_bytes()) {
        *to = from as std::ffi::c_char;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_what_the_boot_protocol_wants() {
        // Code: 64-bit, present, readable. Data: 32-bit, present, writable. Both are flat, with 4
        // GiB.
        assert_eq!(GDT[2], 0x00af_9b00_0000_ffff);
        assert_eq!(GDT[3], 0x00cf_9300_0000_ffff);
    }
}

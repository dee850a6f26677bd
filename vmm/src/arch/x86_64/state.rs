//! The state of a machine as plain data: vCPUs, interrupt lines, clock.
//!
//! All vCPUs are paused before a capture. Before a restore the machine has the same vCPUs, and none
//! of them has run.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::ioapic::{IoApic, IoApicState};

/// `IA32_TSC_DEADLINE` (SDM 3, 11.5.4.1).
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// Reasons why a state cannot be captured or restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// An ioctl failed.
    #[error("KVM: {ioctl}: {source}")]
    Ioctl {
        /// Name of the ioctl.
        ioctl: &'static str,
        /// The cause.
        source: kvm_ioctls::Error,
    },
    /// KVM refuses the routes of the interrupt lines.
    #[error("KVM: KVM_SET_GSI_ROUTING: {0}")]
    Routes(std::io::Error),
    /// KVM refuses the captured value of a model-specific register.
    #[error("KVM: model-specific register {index:#x} refuses {value:#x}")]
    Msr {
        /// Number of the register.
        index: u32,
        /// The captured value.
        value: u64,
    },
    /// The state has more entries than KVM allows.
    #[error("more CPUID entries or model-specific registers than KVM allows")]
    TooMany,
}

fn failed(ioctl: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> StateError {
    move |source| StateError::Ioctl { ioctl, source }
}

/// Returns the model-specific registers that a state holds (`KVM_GET_MSR_INDEX_LIST`).
pub fn msr_indices(kvm: &Kvm) -> Result<Vec<u32>, StateError> {
    let list = kvm.get_msr_index_list().map_err(failed("KVM_GET_MSR_INDEX_LIST"))?;
    Ok(list.as_slice().to_vec())
}

/// State of one vCPU.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    /// CPUID entries.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Running, halted, or waiting for another vCPU to start it.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments and control registers.
    pub sregs: kvm_sregs,
    /// Floating point and vector registers.
    pub xsave: kvm_xsave,
    /// Extended control registers.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debugregs: kvm_debugregs,
    /// Local APIC page.
    pub lapic: kvm_lapic_state,
    /// Readable model-specific registers, the time stamp counter among them.
    pub msrs: Vec<kvm_msr_entry>,
    /// Frequency of the time stamp counter in kHz, where KVM reports it.
    pub tsc_khz: Option<u32>,
    /// Pending exceptions and interrupts.
    pub events: kvm_vcpu_events,
}

impl VcpuState {
    /// Captures the state of `vcpu`, with the registers of `msrs` that it has.
    pub fn capture(vcpu: &VcpuFd, msrs: &[u32]) -> Result<Self, StateError> {
        Ok(Self {
            // First: the call delivers a pending INIT or SIPI, which changes all other registers.
            mp_state: vcpu.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?,
            regs: vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?,
            xsave: vcpu.get_xsave().map_err(failed("KVM_GET_XSAVE"))?,
            xcrs: vcpu.get_xcrs().map_err(failed("KVM_GET_XCRS"))?,
            debugregs: vcpu.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?,
            lapic: vcpu.get_lapic().map_err(failed("KVM_GET_LAPIC"))?,
            tsc_khz: vcpu.get_tsc_khz().ok(),
            cpuid: vcpu
                .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
                .map_err(failed("KVM_GET_CPUID2"))?
                .as_slice()
                .to_vec(),
            msrs: get_msrs(vcpu, msrs)?,
            events: vcpu.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Restores the state into `vcpu`, which has not run yet.
    ///
    /// KVM requires the order. CPUID decides which registers and bits exist. The special registers
    /// set base and mode of the local APIC, and come before its page. The page sets the timer's
    /// mode, and comes before the deadline, the last of the MSRs. Events come last, because other
    /// calls clear them.
    ///
    /// # Errors
    ///
    /// After an error the vCPU must not run.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<(), StateError> {
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| StateError::TooMany)?;
        vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
        // The host's own frequency needs no scaling, and not every processor can scale.
        if let Some(khz) = self.tsc_khz.filter(|khz| vcpu.get_tsc_khz().ok() != Some(*khz)) {
            vcpu.set_tsc_khz(khz).map_err(failed("KVM_SET_TSC_KHZ"))?;
        }
        vcpu.set_mp_state(self.mp_state).map_err(failed("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs).map_err(failed("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs).map_err(failed("KVM_SET_SREGS"))?;
        // SAFETY: the structure is KVM's whole 4096 bytes, and this process asked the host for no
        // register state (`ARCH_REQ_XCOMP_GUEST_PERM`) that would make KVM read beyond.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(failed("KVM_SET_XSAVE"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(failed("KVM_SET_XCRS"))?;
        vcpu.set_debug_regs(&self.debugregs).map_err(failed("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic).map_err(failed("KVM_SET_LAPIC"))?;
        set_msrs(vcpu, &self.msrs)?;
        vcpu.set_vcpu_events(&self.events).map_err(failed("KVM_SET_VCPU_EVENTS"))
    }
}

/// Reads registers. KVM stops at the first register that this vCPU does not have, which is left
/// out.
fn get_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, StateError> {
    let entry = |index: &u32| kvm_msr_entry { index: *index, ..Default::default() };
    let mut rest: Vec<_> = indices.iter().map(entry).collect();
    rest.sort_by_key(|entry| entry.index == MSR_TSC_DEADLINE);
    let mut read = Vec::with_capacity(rest.len());
    while !rest.is_empty() {
        let mut msrs = Msrs::from_entries(&rest).map_err(|_| StateError::TooMany)?;
        let count = vcpu.get_msrs(&mut msrs).map_err(failed("KVM_GET_MSRS"))?.min(rest.len());
        read.extend_from_slice(&msrs.as_slice()[..count]);
        rest.drain(..(count + 1).min(rest.len()));
    }
    Ok(read)
}

fn set_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), StateError> {
    let msrs = Msrs::from_entries(entries).map_err(|_| StateError::TooMany)?;
    let count = vcpu.set_msrs(&msrs).map_err(failed("KVM_SET_MSRS"))?;
    match entries.get(count) {
        None => Ok(()),
        Some(refused) => Err(StateError::Msr { index: refused.index, value: refused.data }),
    }
}

/// State of a machine, apart from its vCPUs, memory and virtio devices.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmState {
    /// Registers of the IO-APIC.
    pub ioapic: IoApicState,
    /// kvmclock, in nanoseconds.
    pub clock: kvm_clock_data,
}

impl VmState {
    /// Captures the state of `vm` and of its IO-APIC.
    pub fn capture(vm: &VmFd, ioapic: &IoApic) -> Result<Self, StateError> {
        Ok(Self {
            ioapic: ioapic.state().clone(),
            clock: vm.get_clock().map_err(failed("KVM_GET_CLOCK"))?,
        })
    }

    /// Restores the state into `vm`, whose vCPUs do not run, and into its IO-APIC. The clock
    /// continues from the captured time.
    ///
    /// # Errors
    ///
    /// After an error the machine must not run.
    pub fn restore(&self, vm: &VmFd, ioapic: &mut IoApic) -> Result<(), StateError> {
        ioapic.restore(&self.ioapic).map_err(StateError::Routes)?;
        // KVM sets the flags, which describe its own time; a caller cannot.
        let clock = kvm_clock_data { clock: self.clock.clock, ..Default::default() };
        vm.set_clock(&clock).map_err(failed("KVM_SET_CLOCK"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::arch::x86_64::{cpuid, layout, regs};
    use crate::devices::virtio::rng::Rng;
    use crate::memory::GuestRam;
    use crate::vm::Vm;

    const MSR_TSC: u32 = 0x10;

    struct Machine {
        vm: Vm,
        vcpu: VcpuFd,
        msrs: Vec<u32>,
    }

    /// A machine whose vCPU is as at power-on. `None` without KVM.
    fn machine() -> Option<Machine> {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("left out: needs /dev/kvm");
            return None;
        };
        let vm = Vm::new(&kvm, GuestRam::new(64).unwrap()).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let entries = cpuid::for_vcpu(vm.supported_cpuid(), 0, 1, false);
        vcpu.set_cpuid2(&CpuId::from_entries(&entries).unwrap()).unwrap();
        let msrs = msr_indices(&kvm).unwrap();
        Some(Machine { vm, vcpu, msrs })
    }

    /// Returns the state as JSON, without the running time stamp counter.
    fn still(mut state: VcpuState) -> Value {
        state.msrs.retain(|msr| msr.index != MSR_TSC);
        serde_json::to_value(state).unwrap()
    }

    #[test]
    fn a_vcpu_is_the_same_in_another_machine() {
        let (Some(mut from), Some(to)) = (machine(), machine()) else { return };
        let ram = from.vm.ram();
        regs::write_tables(ram).unwrap();
        // mov rax, 0x1234567; out 0x10, al
        let code = [0x48, 0xc7, 0xc0, 0x67, 0x45, 0x23, 1, 0xe6, 0x10];
        ram.memory().write_slice(&code, GuestAddress(0x10_0000)).unwrap();
        let mut at_boot = regs::VcpuRegs::at_boot(&from.vcpu, 0, 0x10_0000).unwrap();
        at_boot.fpu.xmm[1] = [7; 16];
        at_boot.apply(&from.vcpu).unwrap();
        let exit = format!("{:?}", from.vcpu.run().unwrap());
        assert!(exit.starts_with("IoOut(16"), "{exit}");
        let state = VcpuState::capture(&from.vcpu, &from.msrs).unwrap();
        assert_eq!(state.regs.rax, 0x0123_4567);
        let written = serde_json::to_vec(&state).unwrap();
        let state: VcpuState = serde_json::from_slice(&written).unwrap();
        state.restore(&to.vcpu).unwrap();
        let again = VcpuState::capture(&to.vcpu, &to.msrs).unwrap();
        let tsc = |state: &VcpuState| {
            state.msrs.iter().find(|msr| msr.index == MSR_TSC).map(|msr| msr.data)
        };
        assert!(tsc(&again) >= tsc(&state));
        assert!(state.msrs.len() > 5, "{} registers", state.msrs.len());
        assert_eq!(still(again), still(state));
    }

    #[test]
    fn interrupt_lines_and_clock_are_the_same_in_another_machine() {
        let (Some(mut from), Some(mut to)) = (machine(), machine()) else { return };
        for vm in [&mut from.vm, &mut to.vm] {
            assert_eq!(vm.add_virtio(Box::<Rng>::default()).unwrap().irq, 1);
        }
        // The device's entry in the IO-APIC, as a guest's kernel writes it.
        let ioapic: u64 = layout::IOAPIC_START.into();
        for (register, value) in [(0x13_u32, 0x0100_0000_u32), (0x12, 0x31)] {
            from.vm.mmio.write(ioapic, &register.to_le_bytes());
            from.vm.mmio.write(ioapic + 0x10, &value.to_le_bytes());
        }
        let mut state = from.vm.state().unwrap();
        state.clock.clock = 3_600_000_000_000;
        let written = serde_json::to_vec(&state).unwrap();
        let state: VmState = serde_json::from_slice(&written).unwrap();
        to.vm.restore(&state).unwrap();
        let mut again = to.vm.state().unwrap();
        assert!((state.clock.clock..2 * state.clock.clock).contains(&again.clock.clock));
        again.clock = state.clock;
        assert_eq!(again.ioapic, state.ioapic);
        assert_ne!(machine().unwrap().vm.state().unwrap().ioapic, state.ioapic);
    }
}

//! The KVM virtual machine: memory slots, interrupt controllers, event descriptors.

use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex};

use kvm_bindings::{
    CpuId, KVM_CAP_PMU_CAPABILITY, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY,
    KVM_PMU_CAP_DISABLE, KvmIrqRouting, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::ioapic::{self, IoApic};
use crate::arch::x86_64::layout;
use crate::arch::x86_64::state::{StateError, VmState};
use crate::bus::{Bus, BusDevice};
use crate::devices::virtio::mmio::{INTERRUPT_ACK, MmioTransport, QUEUE_NOTIFY};
use crate::devices::virtio::registers::RegisterPages;
use crate::devices::virtio::{self, Interrupt, VirtioDevice};
use crate::end::EndSignal;
use crate::memory::GuestRam;
use crate::sync::lock;

/// The version of the KVM API that all Linux since 2.6.22 has.
const KVM_API_VERSION: i32 = 12;

/// KVM refused something.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The descriptor is no `/dev/kvm` of an API that is known.
    #[error("/dev/kvm speaks version {0} of the KVM API, not {KVM_API_VERSION}")]
    Api(i32),
    /// The host's KVM is too old or too small.
    #[error("the host's KVM lacks {0:?}; a Linux of 5.10 or later has it")]
    Missing(Cap),
    /// An ioctl failed.
    #[error("KVM: {what}: {source}")]
    Ioctl {
        /// What was wanted.
        what: &'static str,
        /// Why not.
        source: kvm_ioctls::Error,
    },
    /// The host gives no event descriptor or address space for the machine.
    #[error("making the machine's event descriptors and registers: {0}")]
    Event(std::io::Error),
    /// The device needs a host resource that is not to be had.
    #[error("the {device} device: making its event descriptors: {source}")]
    Device {
        /// Which.
        device: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// All interrupt lines are taken.
    #[error("more virtio devices than the {} interrupt lines", layout::IRQ_LAST - layout::VIRTIO_IRQ_FIRST + 1)]
    TooManyDevices,
}

fn ioctl(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |source| VmError::Ioctl { what, source }
}

/// A virtual machine without processors.
pub struct Vm {
    fd: Arc<VmFd>,
    supported_cpuid: CpuId,
    ram: GuestRam,
    /// Memory-mapped devices.
    pub mmio: Bus,
    /// Port devices.
    pub ports: Bus,
    devices: u32,
    ioapic: Arc<Mutex<IoApic>>,
    registers: RegisterPages,
    /// Takes the driver's acknowledgement of each interrupt, which nobody needs; so it is an exit to
    /// KVM but not to this process.
    acknowledged: EventFd,
    end: Arc<EndSignal>,
}

/// Takes the performance counters away. CPUID hides only those of newer processors; AMD's first four
/// have no bit there. KVM has had a switch since Linux 5.18, and refuses it where it has no counters.
fn disable_counters(vm: &VmFd) -> Result<(), VmError> {
    let switches = vm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
    if switches & KVM_PMU_CAP_DISABLE as i32 == 0 {
        return Ok(());
    }
    let mut cap = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, ..Default::default() };
    cap.args[0] = KVM_PMU_CAP_DISABLE.into();
    vm.enable_cap(&cap).map_err(ioctl("taking the performance counters away"))
}

/// Leaves the local APICs to KVM, and nothing else of what interrupts. Linux 4.4 has it.
fn split_irqchip(vm: &VmFd) -> Result<(), VmError> {
    let mut cap = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    cap.args[0] = ioapic::MAX_LINES as u64;
    vm.enable_cap(&cap).map_err(ioctl("creating the interrupt controllers"))
}

/// The IO-APIC of `vm`, whose failure is the machine's end.
fn new_ioapic(vm: &Arc<VmFd>, end: &Arc<EndSignal>) -> IoApic {
    let (vm, end) = (Arc::clone(vm), Arc::clone(end));
    let route = move |routes: &KvmIrqRouting| Ok(vm.set_gsi_routing(routes)?);
    IoApic::new(route, move |e| end.fail(format!("KVM refuses to send interrupts: {e}")))
}

/// Where a virtio device was put, as the kernel command line wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioSlot {
    /// Guest physical address of its registers.
    pub address: u64,
    /// Its interrupt line.
    pub irq: u32,
}

impl Vm {
    /// Makes a machine whose RAM is `ram`.
    ///
    /// # Errors
    ///
    /// When the host's KVM is not usable.
    pub fn new(kvm: &Kvm, ram: GuestRam) -> Result<Self, VmError> {
        if kvm.get_api_version() != KVM_API_VERSION {
            return Err(VmError::Api(kvm.get_api_version()));
        }
        for cap in [
            Cap::SplitIrqchip,
            Cap::Ioeventfd,
            Cap::Irqfd,
            Cap::UserMemory,
            Cap::ReadonlyMem,
            Cap::ImmediateExit,
        ] {
            if !kvm.check_extension(cap) {
                return Err(VmError::Missing(cap));
            }
        }
        let supported_cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(ioctl("reading the supported CPUID"))?;
        let fd = kvm.create_vm().map_err(ioctl("creating a virtual machine"))?;
        disable_counters(&fd)?;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP_START)
            .map_err(ioctl("placing the identity map"))?;
        fd.set_tss_address(layout::KVM_TSS_START).map_err(ioctl("placing the task state"))?;
        split_irqchip(&fd)?;
        let fd = Arc::new(fd);
        let end = Arc::new(EndSignal::new().map_err(VmError::Event)?);
        let ioapic = Arc::new(Mutex::new(new_ioapic(&fd, &end)));
        let mut mmio = Bus::default();
        mmio.insert(layout::IOAPIC_START.into(), ioapic::SIZE, Arc::clone(&ioapic) as _);
        let vm = Self {
            fd,
            supported_cpuid,
            ram,
            mmio,
            ioapic,
            ports: Bus::default(),
            devices: 0,
            registers: RegisterPages::new(layout::VIRTIO_MMIO_LEN as usize)
                .map_err(VmError::Event)?,
            acknowledged: EventFd::new(libc::EFD_NONBLOCK).map_err(VmError::Event)?,
            end,
        };
        vm.register_ram()?;
        vm.register_registers()?;
        Ok(vm)
    }

    /// Lets guests read the devices' registers like memory.
    fn register_registers(&self) -> Result<(), VmError> {
        let region = kvm_userspace_memory_region {
            slot: self.ram.parts().len() as u32,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: layout::VIRTIO_MMIO_START,
            memory_size: layout::VIRTIO_MMIO_LEN,
            userspace_addr: self.registers.host_addr(),
        };
        // SAFETY: the range is a whole mapping that `self.registers` keeps for as long as the VM
        // lives; RAM has none of these guest addresses.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(ioctl("registering the devices' registers"))
    }

    fn register_ram(&self) -> Result<(), VmError> {
        for (slot, part) in (0..).zip(self.ram.parts()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: part.guest_addr,
                memory_size: part.len,
                userspace_addr: part.host_addr,
            };
            // SAFETY: the range is a whole mapping that `self.ram` keeps for as long as the VM
            // lives, and no two parts overlap in either address space.
            unsafe { self.fd.set_user_memory_region(region) }
                .map_err(ioctl("registering guest memory"))?;
        }
        Ok(())
    }

    /// Guest RAM.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The interrupt lines that have a device. A machine without a device has none.
    pub fn irqs(&self) -> RangeInclusive<u8> {
        // Lines are at most `IRQ_LAST`.
        let first = layout::VIRTIO_IRQ_FIRST as u8;
        first..=(first + self.devices as u8 - 1)
    }

    /// Given when the machine cannot go on.
    pub fn end(&self) -> &Arc<EndSignal> {
        &self.end
    }

    /// What CPUID can say here.
    pub fn supported_cpuid(&self) -> &CpuId {
        &self.supported_cpuid
    }

    /// Makes vCPU `index`.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn create_vcpu(&self, index: u8) -> Result<VcpuFd, VmError> {
        self.fd.create_vcpu(index.into()).map_err(ioctl("creating a vCPU"))
    }

    /// What KVM knows of the machine beside vCPUs and memory. The vCPUs have to be paused.
    ///
    /// # Errors
    ///
    /// The ioctl that failed.
    pub fn state(&self) -> Result<VmState, StateError> {
        VmState::capture(&self.fd, &lock(&self.ioapic))
    }

    /// Makes the machine what another was.
    ///
    /// # Errors
    ///
    /// The ioctl that failed; the machine is then not to be run.
    pub fn restore(&self, state: &VmState) -> Result<(), StateError> {
        state.restore(&self.fd, &mut lock(&self.ioapic))
    }

    /// Puts a virtio device into the next free window and line.
    ///
    /// # Errors
    ///
    /// When there is none, or KVM or the host refuses an event descriptor.
    pub fn add_virtio(&mut self, device: Box<dyn VirtioDevice>) -> Result<MmioSlot, VmError> {
        let irq = layout::VIRTIO_IRQ_FIRST + self.devices;
        if irq > layout::IRQ_LAST {
            return Err(VmError::TooManyDevices);
        }
        let offset = u64::from(self.devices) * layout::VIRTIO_MMIO_SIZE;
        let address = layout::VIRTIO_MMIO_START + offset;
        self.devices += 1;
        lock(&self.ioapic).add_line(irq);
        let name = virtio::name(device.device_type());
        let failed = |source| VmError::Device { device: name, source };
        let line = EventFd::new(libc::EFD_NONBLOCK).map_err(failed)?;
        self.fd.register_irqfd(&line, irq).map_err(ioctl("registering an interrupt"))?;
        let transport = MmioTransport::new(
            device,
            self.ram.memory().clone(),
            Interrupt::new(line),
            self.registers.window(offset as usize),
            Arc::clone(&self.end),
        )
        .map_err(failed)?;
        let notify = IoEventAddress::Mmio(address + QUEUE_NOTIFY);
        for (queue, kick) in transport.worker_kicks() {
            self.fd
                .register_ioevent(kick, &notify, queue)
                .map_err(ioctl("registering a queue's kick"))?;
        }
        let acknowledge = IoEventAddress::Mmio(address + INTERRUPT_ACK);
        self.fd
            .register_ioevent(&self.acknowledged, &acknowledge, NoDatamatch)
            .map_err(ioctl("registering the acknowledgement of interrupts"))?;
        let device: Arc<Mutex<dyn BusDevice>> = Arc::new(Mutex::new(transport));
        self.mmio.insert(address, layout::VIRTIO_MMIO_SIZE, device);
        Ok(MmioSlot { address, irq })
    }
}

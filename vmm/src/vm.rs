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
use crate::devices::virtio::device::{VirtioDevice, device_name};
use crate::devices::virtio::interrupt::Interrupt;
use crate::devices::virtio::mmio::{INTERRUPT_ACK, MmioTransport, QUEUE_NOTIFY};
use crate::devices::virtio::registers::{RegisterPages, RegisterWindow};
use crate::devices::virtio::slot::{Plugged, Slot};
use crate::end::EndSignal;
use crate::memory::GuestRam;
use crate::sync::lock;

/// Version of the KVM API of every Linux since 2.6.22.
const KVM_API_VERSION: i32 = 12;

/// Errors of KVM and of the machine's resources.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The descriptor is not `/dev/kvm`, or of an unknown API.
    #[error("/dev/kvm speaks version {0} of the KVM API, not {KVM_API_VERSION}")]
    Api(i32),
    /// The host's KVM lacks a capability.
    #[error("the host's KVM lacks {0:?}; a Linux of 5.10 or later has it")]
    Missing(Cap),
    /// An ioctl failed.
    #[error("KVM cannot {what}: {source}")]
    Ioctl {
        /// The step that failed, as an infinitive.
        what: &'static str,
        /// The cause.
        source: kvm_ioctls::Error,
    },
    /// The host has no event descriptor or address space left for the machine.
    #[error("cannot make the machine's event descriptors and registers: {0}")]
    Event(std::io::Error),
    /// The host has no resource left for a device.
    #[error("cannot make the event descriptors of the {device} device: {source}")]
    Device {
        /// Name of the device.
        device: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// All interrupt lines have a device.
    #[error(
        "more virtio devices than the {} interrupt lines",
        layout::IRQ_LAST - layout::VIRTIO_IRQ_FIRST + 1
    )]
    TooManyDevices,
    /// There is no such slot, or it has a device already.
    #[error("disk slot {0} is in use, or there is no such slot")]
    NoSlot(u8),
    /// A device does not come out of its slot.
    #[error("disk slot {0} is empty, or its device is still busy")]
    Busy(u8),
}

fn ioctl(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |source| VmError::Ioctl { what, source }
}

/// A virtual machine without vCPUs.
pub struct Vm {
    fd: Arc<VmFd>,
    supported_cpuid: CpuId,
    ram: GuestRam,
    /// Bus of memory-mapped devices.
    pub mmio: Bus,
    /// Bus of ports.
    pub ports: Bus,
    devices: u32,
    ioapic: Arc<Mutex<IoApic>>,
    registers: RegisterPages,
    /// Takes the driver's acknowledgement of each interrupt, which has no effect. So the
    /// acknowledgement is an exit to KVM, but not to this process.
    acknowledged: EventFd,
    /// Places for devices that come later, with their numbers in the order of all devices.
    slots: Vec<(u32, Arc<Mutex<Slot>>)>,
    end: Arc<EndSignal>,
}

/// Disables the performance counters. CPUID hides only those of newer processors: AMD's first four
/// have no bit there. KVM has had a switch since Linux 5.18, and refuses it if it has no counters.
fn disable_counters(vm: &VmFd) -> Result<(), VmError> {
    let switches = vm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
    if switches & KVM_PMU_CAP_DISABLE as i32 == 0 {
        return Ok(());
    }
    let mut cap = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, ..Default::default() };
    cap.args[0] = KVM_PMU_CAP_DISABLE.into();
    vm.enable_cap(&cap).map_err(ioctl("disable the performance counters"))
}

/// Leaves only the local APICs to KVM, and no other interrupt controller. Linux 4.4 supports this.
fn split_irqchip(vm: &VmFd) -> Result<(), VmError> {
    let mut cap = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    cap.args[0] = ioapic::MAX_LINES as u64;
    vm.enable_cap(&cap).map_err(ioctl("create the interrupt controllers"))
}

/// Creates the IO-APIC of `vm`. Its failure ends the machine.
fn new_ioapic(vm: &Arc<VmFd>, end: &Arc<EndSignal>) -> IoApic {
    let (vm, end) = (Arc::clone(vm), Arc::clone(end));
    let route = move |routes: &KvmIrqRouting| Ok(vm.set_gsi_routing(routes)?);
    IoApic::new(route, move |e| end.fail(format!("KVM refuses to send interrupts: {e}")))
}

/// Place of a virtio device, for the kernel command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioSlot {
    /// Guest physical address of the registers.
    pub address: u64,
    /// Interrupt line.
    pub irq: u32,
}

impl Vm {
    /// Creates a machine with the RAM `ram`.
    ///
    /// # Errors
    ///
    /// When the host's KVM lacks a capability or refuses a step.
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
            .map_err(ioctl("report the supported CPUID"))?;
        let fd = kvm.create_vm().map_err(ioctl("create a virtual machine"))?;
        disable_counters(&fd)?;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP_START)
            .map_err(ioctl("place the identity map"))?;
        fd.set_tss_address(layout::KVM_TSS_START).map_err(ioctl("place the task state"))?;
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
            slots: Vec::new(),
            end,
        };
        vm.register_ram()?;
        vm.register_registers()?;
        Ok(vm)
    }

    /// Makes the devices' registers readable like memory.
    fn register_registers(&self) -> Result<(), VmError> {
        let region = kvm_userspace_memory_region {
            slot: self.ram.parts().len() as u32,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: layout::VIRTIO_MMIO_START,
            memory_size: layout::VIRTIO_MMIO_LEN,
            userspace_addr: self.registers.host_addr(),
        };
        // SAFETY: the range is a whole mapping that `self.registers` keeps as long as the VM lives.
        // RAM has none of these guest addresses.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(ioctl("register the devices' registers"))
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
            // SAFETY: the range is a whole mapping that `self.ram` keeps as long as the VM lives.
            // No two parts overlap in either address space.
            unsafe { self.fd.set_user_memory_region(region) }
                .map_err(ioctl("register guest memory"))?;
        }
        Ok(())
    }

    /// Returns guest RAM.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Returns the interrupt lines that have a device, none for a machine without devices.
    pub fn irqs(&self) -> RangeInclusive<u8> {
        // Lines are at most `IRQ_LAST`.
        let first = layout::VIRTIO_IRQ_FIRST as u8;
        first..=(first + self.devices as u8 - 1)
    }

    /// Returns the signal of the machine's end.
    pub fn end(&self) -> &Arc<EndSignal> {
        &self.end
    }

    /// Returns the CPUID that KVM supports.
    pub fn supported_cpuid(&self) -> &CpuId {
        &self.supported_cpuid
    }

    /// Creates vCPU `index`.
    pub fn create_vcpu(&self, index: u8) -> Result<VcpuFd, VmError> {
        self.fd.create_vcpu(index.into()).map_err(ioctl("create a vCPU"))
    }

    /// Returns KVM's state of the machine, without vCPUs and memory. The vCPUs must be paused.
    pub fn state(&self) -> Result<VmState, StateError> {
        VmState::capture(&self.fd, &lock(&self.ioapic))
    }

    /// Restores the state of another machine.
    ///
    /// # Errors
    ///
    /// After an error the machine must not run.
    pub fn restore(&self, state: &VmState) -> Result<(), StateError> {
        state.restore(&self.fd, &mut lock(&self.ioapic))
    }

    /// Adds a virtio device at the next free window and interrupt line.
    ///
    /// # Errors
    ///
    /// When no line is free, or KVM or the host refuses an event descriptor.
    pub fn add_virtio(&mut self, device: Box<dyn VirtioDevice>) -> Result<MmioSlot, VmError> {
        let (_, place, window) = self.next_place()?;
        let Plugged { transport, .. } = self.connect(device, place, window)?;
        let device: Arc<Mutex<dyn BusDevice>> = Arc::new(Mutex::new(transport));
        self.mmio.insert(place.address, layout::VIRTIO_MMIO_SIZE, device);
        Ok(place)
    }

    /// Reserves the next free window and interrupt line for a device that may come later. KVM has
    /// nothing of it until then.
    ///
    /// # Errors
    ///
    /// When no line is free.
    pub fn add_slot(&mut self) -> Result<MmioSlot, VmError> {
        let (number, place, window) = self.next_place()?;
        let slot = Arc::new(Mutex::new(Slot::new(window)));
        self.slots.push((number, Arc::clone(&slot)));
        self.mmio.insert(place.address, layout::VIRTIO_MMIO_SIZE, slot);
        Ok(place)
    }

    /// Puts a device into a slot. Returns the device's number in the order of all devices, which is
    /// its number in the guest. The guest looks at it only when it is told to.
    ///
    /// # Errors
    ///
    /// When the slot is in use, or KVM or the host refuses an event descriptor.
    pub fn plug(&self, slot: u8, device: Box<dyn VirtioDevice>) -> Result<u32, VmError> {
        let (number, found) = self.slots.get(usize::from(slot)).ok_or(VmError::NoSlot(slot))?;
        let mut found = lock(found);
        if found.is_in_use() {
            return Err(VmError::NoSlot(slot));
        }
        let (place, window) = self.place_of(*number);
        match self.connect(device, place, window) {
            Ok(plugged) => found.plug(plugged),
            Err(error) => {
                // The device has shown itself already.
                found.show_empty();
                return Err(error);
            }
        }
        Ok(*number)
    }

    /// Resets the device in a slot, and takes it out.
    ///
    /// # Errors
    ///
    /// When the slot is empty, or the device is busy. The device is still there then.
    pub fn unplug(&self, slot: u8) -> Result<(), VmError> {
        let (number, found) = self.slots.get(usize::from(slot)).ok_or(VmError::NoSlot(slot))?;
        let plugged = lock(found).unplug().ok_or(VmError::Busy(slot))?;
        let (place, _) = self.place_of(*number);
        self.disconnect(&plugged, place)
    }

    /// Takes the next free window and interrupt line.
    fn next_place(&mut self) -> Result<(u32, MmioSlot, RegisterWindow), VmError> {
        let number = self.devices;
        let (place, window) = self.place_of(number);
        if place.irq > layout::IRQ_LAST {
            return Err(VmError::TooManyDevices);
        }
        self.devices += 1;
        lock(&self.ioapic).add_line(place.irq);
        Ok((number, place, window))
    }

    fn place_of(&self, number: u32) -> (MmioSlot, RegisterWindow) {
        let offset = u64::from(number) * layout::VIRTIO_MMIO_SIZE;
        let address = layout::VIRTIO_MMIO_START + offset;
        let place = MmioSlot { address, irq: layout::VIRTIO_IRQ_FIRST + number };
        (place, self.registers.window(offset as usize))
    }

    /// Puts a device behind a transport, and connects both with KVM.
    fn connect(
        &self,
        device: Box<dyn VirtioDevice>,
        place: MmioSlot,
        window: RegisterWindow,
    ) -> Result<Plugged, VmError> {
        let name = device_name(device.device_type());
        let failed = |source| VmError::Device { device: name, source };
        let line = EventFd::new(libc::EFD_NONBLOCK).map_err(failed)?;
        let transport = MmioTransport::new(
            device,
            self.ram.memory().clone(),
            Interrupt::new(line.try_clone().map_err(failed)?),
            window,
            Arc::clone(&self.end),
        )
        .map_err(failed)?;
        let plugged = Plugged { transport, line };
        match self.register(&plugged, place) {
            Ok(()) => Ok(plugged),
            Err(error) => {
                // Only registered parts can be taken back. The others fail here.
                let _ = self.disconnect(&plugged, place);
                Err(error)
            }
        }
    }

    fn register(&self, plugged: &Plugged, place: MmioSlot) -> Result<(), VmError> {
        let Plugged { transport, line } = plugged;
        self.fd.register_irqfd(line, place.irq).map_err(ioctl("register an interrupt"))?;
        let notify = IoEventAddress::Mmio(place.address + QUEUE_NOTIFY);
        for (queue, kick) in transport.worker_kicks() {
            self.fd
                .register_ioevent(kick, &notify, queue)
                .map_err(ioctl("register a queue's kick"))?;
        }
        let acknowledge = IoEventAddress::Mmio(place.address + INTERRUPT_ACK);
        self.fd
            .register_ioevent(&self.acknowledged, &acknowledge, NoDatamatch)
            .map_err(ioctl("register the acknowledgement of interrupts"))
    }

    /// Takes back the connections of [`Self::connect`]: all of them, even if one fails.
    fn disconnect(&self, plugged: &Plugged, place: MmioSlot) -> Result<(), VmError> {
        let Plugged { transport, line } = plugged;
        let interrupt =
            self.fd.unregister_irqfd(line, place.irq).map_err(ioctl("take back an interrupt"));
        let notify = IoEventAddress::Mmio(place.address + QUEUE_NOTIFY);
        let mut kicks = Ok(());
        for (queue, kick) in transport.worker_kicks() {
            let taken = self.fd.unregister_ioevent(kick, &notify, queue);
            kicks = kicks.and(taken.map_err(ioctl("take back a queue's kick")));
        }
        let acknowledge = IoEventAddress::Mmio(place.address + INTERRUPT_ACK);
        let acknowledged = self
            .fd
            .unregister_ioevent(&self.acknowledged, &acknowledge, NoDatamatch)
            .map_err(ioctl("take back the acknowledgement of interrupts"));
        interrupt.and(kicks).and(acknowledged)
    }
}

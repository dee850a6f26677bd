//! Puts a microVM together from its configuration, up to the first guest instruction.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::sync::Arc;
use std::thread;

use kvm_ioctls::{Kvm, VcpuFd};
use linux_loader::cmdline::Cmdline;

use crate::arch::x86_64::{boot, cpuid, layout, mptable, regs};
use crate::config::VmConfig;
use crate::devices::console::{SerialConsole, SharedLog};
use crate::devices::reset::ResetPort;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::Block;
use crate::devices::virtio::fs::{Fs, Share};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::Vsock;
use crate::jail::{self, JailError};
use crate::memory::{GuestRam, MemoryError};
use crate::usage::{MemoryMeter, VcpuStats};
use crate::vcpu::{EndSignal, Vcpus};
use crate::vm::{Vm, VmError};

/// What the VMM has to say on every command line.
///
/// `quiet` leaves the early console to errors; a panic restarts at once, through the i8042's
/// reset line; and nothing is looked for that is not there.
const CMDLINE: &str = "quiet earlyprintk=serial,ttyS0,115200,keep panic=-1 reboot=k \
                       random.trust_cpu=on rdinit=/init";

/// The microVM cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Kernel, image, boot parameters.
    #[error(transparent)]
    Boot(#[from] boot::BootError),
    /// A vCPU's registers.
    #[error("KVM: setting up vCPU {index}: {source}")]
    Vcpu {
        /// Which.
        index: u8,
        /// Why.
        source: kvm_ioctls::Error,
    },
    /// A volume.
    #[error("{path}: {source}; a volume is a raw image file or a block device")]
    Block {
        /// Where it was opened.
        path: String,
        /// Why it is not usable.
        source: io::Error,
    },
    /// The jail.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// A host resource.
    #[error("{what}: {source}")]
    Host {
        /// What was wanted.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> BuildError {
    move |source| BuildError::Host { what, source }
}

/// A microVM whose vCPUs wait to be let run.
pub struct Microvm {
    /// Its processors.
    pub vcpus: Vcpus,
    /// Told when it ends.
    pub end: Arc<EndSignal>,
    /// What its kernel said.
    pub console: SharedLog,
    /// What its memory costs.
    pub memory_meter: MemoryMeter,
    /// KVM's counters, a vCPU each, on kernels that have them.
    pub stats: Vec<VcpuStats>,
    /// Keeps KVM's machine, its event descriptors and its memory.
    _vm: Vm,
}

/// The descriptors of a configuration, owned.
struct Inherited;

impl Inherited {
    fn take(fd: i32) -> OwnedFd {
        // SAFETY: the configuration was validated to name each descriptor once, the numbers were
        // inherited for this process alone, and each is taken at one place only.
        unsafe { OwnedFd::from_raw_fd(fd) }
    }
}

/// Builds the microVM and enters the jail.
///
/// # Errors
///
/// The first thing that failed; the process is then to exit.
pub fn build(
    config: &VmConfig,
    reset: vmm_sys_util::eventfd::EventFd,
) -> Result<Microvm, BuildError> {
    let ram = GuestRam::new(config.memory_mib)?;
    // SAFETY: the descriptor is owned and given up to `Kvm`.
    let kvm = unsafe { Kvm::from_raw_fd(Inherited::take(config.kvm_fd).into_raw_fd()) };
    let (loaded, vm) = thread::scope(|scope| {
        // Making a machine waits for the host's cgroup and RCU locks, some ten milliseconds on an
        // idle host; meanwhile memory is filled.
        let vm = scope.spawn(|| Vm::new(&kvm, ram.clone()));
        let loaded = load(&ram, config);
        (loaded, vm.join())
    });
    let vm = vm.map_err(|_| host("making a virtual machine")(io::ErrorKind::Other.into()))?;
    let (mut vm, (entry, initramfs)) = (vm?, loaded?);
    let console = SharedLog::new(config.console_fd.map(|fd| File::from(Inherited::take(fd))));
    add_ports(&mut vm, &console, reset);

    let mut cmdline = boot::new_cmdline()?;
    cmdline.insert_str(CMDLINE).map_err(boot::BootError::from)?;
    let share = add_devices(&mut vm, config, &mut cmdline)?;
    if !config.cmdline.is_empty() {
        cmdline.insert_str(&config.cmdline).map_err(boot::BootError::from)?;
    }
    write_boot_tables(&vm, config, &cmdline, initramfs)?;
    let vcpus = create_vcpus(&vm, config.vcpus, entry)?;
    let stats = vcpus.iter().filter_map(|vcpu| VcpuStats::open(vcpu).ok()).collect();
    let memory_meter = MemoryMeter::new(vm.ram().parts()).map_err(host("/proc/self/smaps"))?;

    jail::raise_descriptor_limit().map_err(host("raising the descriptor limit"))?;
    jail::set_no_new_privs()?;
    enter_jail(config, share)?;

    let end = Arc::new(EndSignal::new().map_err(host("making an event descriptor"))?);
    let vcpus = Vcpus::spawn(vcpus, vm.mmio.clone(), vm.ports.clone(), Arc::clone(&end))
        .map_err(host("starting the vCPU threads"))?;
    Ok(Microvm { vcpus, end, console, memory_meter, stats, _vm: vm })
}

fn add_ports(vm: &mut Vm, console: &SharedLog, reset: vmm_sys_util::eventfd::EventFd) {
    use std::sync::Mutex;
    let serial = SerialConsole::new(console.clone());
    vm.ports.insert(layout::SERIAL_PORT.into(), 8, Arc::new(Mutex::new(serial)));
    let reset = ResetPort::new(reset);
    vm.ports.insert(layout::I8042_COMMAND_PORT.into(), 1, Arc::new(Mutex::new(reset)));
}

/// Goes where only the share is to be seen, and opens it there.
fn enter_jail(config: &VmConfig, share: Option<Share>) -> Result<(), BuildError> {
    let open = |share: Share, root: &str, jail| {
        share.open(root, jail).map_err(host("opening the shared directory"))
    };
    let Some(root) = config.jail_root_fd else {
        return share.map_or(Ok(()), |share| open(share, "/", None));
    };
    let antechamber = jail::enter(&Inherited::take(root))?;
    if let Some(share) = share {
        open(share, jail::SHARE, Some(antechamber.clone()))?;
    }
    Ok(antechamber.close()?)
}

/// Adds the virtio devices. Returns a handle to the share, which is opened inside the jail.
fn add_devices(
    vm: &mut Vm,
    config: &VmConfig,
    cmdline: &mut Cmdline,
) -> Result<Option<Share>, BuildError> {
    let mut add = |device: Box<dyn VirtioDevice>| -> Result<(), BuildError> {
        let slot = vm.add_virtio(device)?;
        let parameter = format!("virtio_mmio.device=4K@{:#x}:{}", slot.address, slot.irq);
        Ok(cmdline.insert_str(parameter).map_err(boot::BootError::from)?)
    };
    let listener = UnixListener::from(Inherited::take(config.vsock.listen_fd));
    let connector = UnixDatagram::from(Inherited::take(config.vsock.connect_fd));
    let vsock = Vsock::new(config.vsock.guest_cid, listener, connector)
        .map_err(host("the vsock device's sockets"))?;
    add(Box::new(vsock))?;
    let mut share = None;
    if let Some(fs) = &config.fs {
        let device = Fs::new(fs);
        share = Some(device.share());
        add(Box::new(device))?;
    }
    for block in &config.block {
        let file = File::from(Inherited::take(block.file.fd));
        let device = Block::new(file, block)
            .map_err(|source| BuildError::Block { path: block.file.path.clone(), source })?;
        add(Box::new(device))?;
    }
    add(Box::<Rng>::default())?;
    add(Box::<Balloon>::default())?;
    Ok(share)
}

/// Puts kernel and image into guest memory. Returns the kernel's entry point and where the image is.
fn load(ram: &GuestRam, config: &VmConfig) -> Result<(u64, boot::Initramfs), BuildError> {
    let mut kernel = File::from(Inherited::take(config.kernel.fd));
    let mut initramfs = File::from(Inherited::take(config.initramfs.fd));
    let kernel = boot::load_kernel(ram, &mut kernel, &config.kernel.path)?;
    let initramfs = boot::load_initramfs(ram, &mut initramfs, &config.initramfs.path, kernel.end)?;
    Ok((kernel.entry, initramfs))
}

fn write_boot_tables(
    vm: &Vm,
    config: &VmConfig,
    cmdline: &Cmdline,
    initramfs: boot::Initramfs,
) -> Result<(), BuildError> {
    let ram = vm.ram();
    boot::write_params(ram, cmdline, initramfs)?;
    mptable::write(ram, config.vcpus, vm.irqs())?;
    Ok(regs::write_tables(ram)?)
}

fn create_vcpus(vm: &Vm, count: u8, entry: u64) -> Result<Vec<VcpuFd>, BuildError> {
    (0..count)
        .map(|index| {
            let vcpu = vm.create_vcpu(index)?;
            let set_up = || -> Result<(), kvm_ioctls::Error> {
                let entries = cpuid::for_vcpu(vm.supported_cpuid(), index, count);
                let entries = kvm_bindings::CpuId::from_entries(&entries)
                    .map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
                vcpu.set_cpuid2(&entries)?;
                regs::VcpuRegs::at_boot(&vcpu, index, entry)?.apply(&vcpu)
            };
            set_up().map_err(|source| BuildError::Vcpu { index, source })?;
            Ok(vcpu)
        })
        .collect()
}

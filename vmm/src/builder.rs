//! Builds a microVM from its configuration, up to the first guest instruction.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::sync::Arc;
use std::thread;

use kvm_ioctls::{Kvm, VcpuFd};
use linux_loader::cmdline::Cmdline;

use crate::arch::x86_64::{boot, cpuid, kernel, layout, mptable, regs};
use crate::config::{self, ConfigError, NetConfig, VmConfig};
use crate::devices::reset::ResetPort;
use crate::devices::serial::{SerialConsole, SharedLog};
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::Block;
use crate::devices::virtio::device::VirtioDevice;
use crate::devices::virtio::fs::{Fs, Share};
use crate::devices::virtio::net::{Net, NetError};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::{StreamBytes, Vsock};
use crate::end::EndSignal;
use crate::inherited::{Descriptors, Inherited};
use crate::jail::{self, JailError};
use crate::memory::{GuestRam, MemoryError};
use crate::usage::{MemoryMeter, VcpuStats};
use crate::vcpu::Vcpus;
use crate::vm::{MmioSlot, Vm, VmError};

/// Parameters of every kernel command line.
///
/// `quiet` limits the early console to errors. A panic restarts at once (`panic=-1`), through the
/// reset line of the i8042 (`reboot=k`). The restart skips the shutdown of interrupt controllers
/// (`reboot=f`), which end with the machine. `random.trust_cpu=on` seeds the kernel's random
/// numbers from the processor.
const CMDLINE: &str = "quiet earlyprintk=serial,ttyS0,115200,keep panic=-1 reboot=k,f \
                       random.trust_cpu=on rdinit=/init";

// Socket, file system, entropy and balloon device have a line each, as has every disk and network
// interface.
const _: () = assert!(
    config::MAX_BLOCK_AND_NET_DEVICES + 4
        <= (layout::IRQ_LAST - layout::VIRTIO_IRQ_FIRST + 1) as usize
);

/// Reasons why a microVM cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The configuration or one of its descriptors is not valid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Guest memory could not be made or written.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM refused the virtual machine.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Kernel, image or boot parameters could not be loaded.
    #[error(transparent)]
    Boot(#[from] boot::BootError),
    /// The registers of a vCPU could not be set.
    #[error("KVM cannot set up vCPU {index}: {source}")]
    Vcpu {
        /// Number of the vCPU.
        index: u8,
        /// The cause.
        source: kvm_ioctls::Error,
    },
    /// A volume cannot be used.
    #[error("{path}: {source}; a volume is a raw image file or a block device")]
    Block {
        /// Path by which the volume was opened.
        path: String,
        /// The cause.
        source: io::Error,
    },
    /// A network interface cannot be used.
    #[error("network device {index}: {source}")]
    Net {
        /// Number of the interface, counted from 0.
        index: usize,
        /// The cause.
        source: NetError,
    },
    /// The VMM could not enter its jail.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The host refused a resource.
    #[error("cannot {what}: {source}")]
    Host {
        /// The step that failed, as an infinitive.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> BuildError {
    move |source| BuildError::Host { what, source }
}

/// A microVM whose vCPUs are paused before their first instruction.
pub struct Microvm {
    /// The vCPUs.
    pub vcpus: Vcpus,
    /// The signal of the microVM's end.
    pub end: Arc<EndSignal>,
    /// Output of the guest kernel's console.
    pub console: SharedLog,
    /// Meter of the process's resident memory.
    pub memory_meter: MemoryMeter,
    /// KVM's counters, one set for each vCPU, on kernels that have them.
    pub stats: Vec<VcpuStats>,
    /// The shared directory, if there is one.
    pub share: Option<Share>,
    /// Bytes of the socket device's streams.
    pub stream_bytes: Arc<StreamBytes>,
    /// KVM's machine, with its event descriptors and its memory.
    pub vm: Vm,
}

/// Builds the microVM and enters the jail.
///
/// # Errors
///
/// The first step that failed. The process must exit then.
pub fn build(
    inherited: Inherited,
    reset: vmm_sys_util::eventfd::EventFd,
) -> Result<Microvm, BuildError> {
    let Inherited { config, mut descriptors } = inherited;
    let config = &config;
    let ram = GuestRam::new(config.memory_mib)?;
    let kvm = descriptors.take(config.kvm_fd)?;
    // SAFETY: `kvm` is an owned descriptor, and `into_raw_fd` gives its ownership up to `Kvm`.
    let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
    let mut kernel = File::from(descriptors.take(config.kernel.fd)?);
    let mut image = File::from(descriptors.take(config.initramfs.fd)?);
    let console = config.console_fd.map(|fd| descriptors.take(fd)).transpose()?;
    let (loaded, vm) = thread::scope(|scope| {
        // KVM waits for the host's cgroup and RCU locks, some ten milliseconds on an idle host.
        // Memory is filled meanwhile.
        let vm = scope.spawn(|| Vm::new(&kvm, ram.clone()));
        let loaded = load(&ram, config, &mut kernel, &mut image);
        (loaded, vm.join())
    });
    let vm =
        vm.map_err(|_| host("make a virtual machine")(io::Error::other("its thread panicked")))?;
    let (mut vm, (entry, initramfs)) = (vm?, loaded?);
    let console = SharedLog::new(console.map(File::from));
    add_ports(&mut vm, &console, reset);

    let mut cmdline = boot::new_cmdline()?;
    cmdline.insert_str(CMDLINE).map_err(boot::BootError::from)?;
    let (share, stream_bytes) = add_devices(&mut vm, config, &mut descriptors, &mut cmdline)?;
    if !config.cmdline.is_empty() {
        cmdline.insert_str(&config.cmdline).map_err(boot::BootError::from)?;
    }
    write_boot_tables(&vm, config, &cmdline, initramfs)?;
    let vcpus = create_vcpus(&vm, config, entry)?;
    let stats = vcpus.iter().filter_map(|vcpu| VcpuStats::open(vcpu).ok()).collect();
    let memory_meter = MemoryMeter::new(vm.ram().parts()).map_err(host("open /proc/self/smaps"))?;

    jail::raise_descriptor_limit().map_err(host("raise the descriptor limit"))?;
    jail::set_no_new_privs()?;
    enter_jail(config.jail_root_fd.map(|fd| descriptors.take(fd)).transpose()?, share.as_ref())?;
    jail::set_undumpable()?;
    jail::keep_only(jail::SERVING)?;

    let end = Arc::clone(vm.end());
    let vcpus = Vcpus::spawn(vcpus, vm.mmio.clone(), vm.ports.clone(), Arc::clone(&end))
        .map_err(host("start the vCPU threads"))?;
    Ok(Microvm { vcpus, end, console, memory_meter, stats, share, stream_bytes, vm })
}

fn add_ports(vm: &mut Vm, console: &SharedLog, reset: vmm_sys_util::eventfd::EventFd) {
    use std::sync::Mutex;
    let serial = SerialConsole::new(console.clone());
    vm.ports.insert(layout::SERIAL_PORT.into(), 8, Arc::new(Mutex::new(serial)));
    let reset = ResetPort::new(reset);
    vm.ports.insert(layout::I8042_COMMAND_PORT.into(), 1, Arc::new(Mutex::new(reset)));
}

/// Enters the jail, where only the share is visible, and opens the share there.
fn enter_jail(root: Option<OwnedFd>, share: Option<&Share>) -> Result<(), BuildError> {
    let open = |share: &Share, root: &str, jail| {
        share.open(root, jail).map_err(host("open the shared directory"))
    };
    let Some(root) = root else {
        return share.map_or(Ok(()), |share| open(share, "/", None));
    };
    let outer_root = jail::enter(&root)?;
    if let Some(share) = share {
        open(share, jail::SHARE, Some(outer_root.clone()))?;
    }
    Ok(outer_root.enter_share()?)
}

/// Adds the virtio devices. Returns a handle of the share, which is opened in the jail, and the
/// counters of the socket device.
fn add_devices(
    vm: &mut Vm,
    config: &VmConfig,
    descriptors: &mut Descriptors,
    cmdline: &mut Cmdline,
) -> Result<(Option<Share>, Arc<StreamBytes>), BuildError> {
    let mut add = |device: Box<dyn VirtioDevice>| -> Result<(), BuildError> {
        let slot = vm.add_virtio(device)?;
        add_parameter(cmdline, slot)
    };
    let listener = UnixListener::from(descriptors.take(config.vsock.listen_fd)?);
    let connector = UnixDatagram::from(descriptors.take(config.vsock.connect_fd)?);
    let vsock = Vsock::new(config.vsock.guest_cid, listener, connector)
        .map_err(host("set up the vsock device's sockets"))?;
    let bytes = vsock.bytes();
    add(Box::new(vsock))?;
    let mut share = None;
    if let Some(fs) = &config.fs {
        let device = Fs::new(fs).map_err(host("set up the file system device"))?;
        share = Some(device.share());
        add(Box::new(device))?;
    }
    for block in &config.block {
        let file = File::from(descriptors.take(block.file.fd)?);
        let device = Block::new(file, &block.serial, block.read_only)
            .map_err(|source| BuildError::Block { path: block.file.path.clone(), source })?;
        add(Box::new(device))?;
    }
    for (index, net) in config.net.iter().enumerate() {
        add(Box::new(new_net(descriptors, index, net)?))?;
    }
    add(Box::<Rng>::default())?;
    add(Box::<Balloon>::default())?;
    for _ in 0..config.disk_slots {
        let slot = vm.add_slot()?;
        add_parameter(cmdline, slot)?;
    }
    Ok((share, bytes))
}

/// Tells the guest's kernel of a device, or of a place for one.
fn add_parameter(cmdline: &mut Cmdline, slot: MmioSlot) -> Result<(), BuildError> {
    let parameter = format!("virtio_mmio.device=4K@{:#x}:{}", slot.address, slot.irq);
    Ok(cmdline.insert_str(parameter).map_err(boot::BootError::from)?)
}

fn new_net(
    descriptors: &mut Descriptors,
    index: usize,
    config: &NetConfig,
) -> Result<Net, BuildError> {
    let mut take =
        |fds: &[i32]| fds.iter().map(|fd| descriptors.take(*fd)).collect::<Result<_, _>>();
    let (taps, vhost) = (take(&config.tap_fds)?, take(&config.vhost_fds)?);
    let socket = config.vhost_socket_fd.map(|fd| descriptors.take(fd)).transpose()?;
    Net::new(taps, vhost, socket, config).map_err(|source| BuildError::Net { index, source })
}

/// Loads kernel and image into guest memory. Returns the kernel's entry point and the image's
/// place.
fn load(
    ram: &GuestRam,
    config: &VmConfig,
    kernel_file: &mut File,
    image: &mut File,
) -> Result<(u64, boot::Initramfs), BuildError> {
    let kernel = kernel::load(ram, kernel_file, &config.kernel.path, config.share_kernel)?;
    let initramfs = boot::load_initramfs(ram, image, &config.initramfs.path, kernel.end)?;
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

fn create_vcpus(vm: &Vm, config: &VmConfig, entry: u64) -> Result<Vec<VcpuFd>, BuildError> {
    let (count, nested) = (config.vcpus, config.nested);
    (0..count)
        .map(|index| {
            let vcpu = vm.create_vcpu(index)?;
            let set_up = || -> Result<(), kvm_ioctls::Error> {
                let entries = cpuid::for_vcpu(vm.supported_cpuid(), index, count, nested);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{
        BlockConfig, FileRef, FsCache, FsConfig, MAX_BLOCK_AND_NET_DEVICES, VsockConfig,
    };

    fn number(owned: impl Into<OwnedFd>) -> i32 {
        owned.into().into_raw_fd()
    }

    fn file() -> FileRef {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        FileRef { fd: number(file), path: "file".to_owned() }
    }

    /// A configuration with the most devices and the longest command line, whose `kvm_fd` is not
    /// KVM.
    fn largest() -> VmConfig {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("vsock.sock")).unwrap();
        let (connector, control) = UnixDatagram::pair().unwrap();
        let block = || BlockConfig { file: file(), serial: String::new(), read_only: false };
        VmConfig {
            id: "one".to_owned(),
            vcpus: config::MAX_VCPUS,
            memory_mib: config::MIN_MEMORY_MIB,
            kvm_fd: file().fd,
            kernel: file(),
            initramfs: file(),
            cmdline: "x".repeat(config::MAX_CMDLINE_LEN / 2),
            nested: false,
            share_kernel: true,
            console_fd: None,
            control_fd: number(control),
            vsock: VsockConfig {
                guest_cid: 3,
                listen_fd: number(listener),
                connect_fd: number(connector),
            },
            fs: Some(FsConfig {
                tag: "share".to_owned(),
                workers: 1,
                cache: FsCache::Auto,
                devices: false,
            }),
            block: (0..MAX_BLOCK_AND_NET_DEVICES).map(|_| block()).collect(),
            net: Vec::new(),
            disk_slots: 0,
            jail_root_fd: None,
        }
    }

    #[test]
    fn the_most_devices_with_the_longest_command_line_can_be_built() {
        let Ok(kvm) = Kvm::new() else { return eprintln!("left out: needs /dev/kvm") };
        // SAFETY: `largest` gave the ownership of its descriptors up to the configuration.
        let inherited = unsafe { Inherited::new(largest()) }.unwrap();
        let Inherited { config, mut descriptors } = inherited;
        let ram = GuestRam::new(config.memory_mib).unwrap();
        let mut vm = Vm::new(&kvm, ram).unwrap();
        let mut cmdline = boot::new_cmdline().unwrap();
        cmdline.insert_str(CMDLINE).unwrap();
        let (share, _) = add_devices(&mut vm, &config, &mut descriptors, &mut cmdline).unwrap();
        assert!(share.is_some());
        cmdline.insert_str(&config.cmdline).unwrap();
        write_boot_tables(&vm, &config, &cmdline, boot::Initramfs { start: 0, len: 0 }).unwrap();
        let one_more = vm.add_virtio(Box::<Rng>::default());
        assert!(matches!(one_more, Err(VmError::TooManyDevices)));
        // A descriptor can be taken once.
        let again = descriptors.take(config.block[0].file.fd);
        assert!(matches!(again, Err(ConfigError::Closed(_))));
    }

    #[test]
    fn a_disk_comes_and_goes_while_the_machine_lives() {
        let Ok(kvm) = Kvm::new() else { return eprintln!("left out: needs /dev/kvm") };
        let mut vm = Vm::new(&kvm, GuestRam::new(config::MIN_MEMORY_MIB).unwrap()).unwrap();
        let place = vm.add_slot().unwrap();
        let id = |vm: &Vm| {
            let mut id = [0; 4];
            vm.mmio.read(place.address + 8, &mut id);
            u32::from_le_bytes(id)
        };
        let disk = || {
            let file = tempfile::tempfile().unwrap();
            file.set_len(4096).unwrap();
            Box::new(Block::new(file, "", false).unwrap())
        };
        assert!(matches!(vm.unplug(0), Err(VmError::Busy(0))));
        assert!(matches!(vm.plug(1, disk()), Err(VmError::NoSlot(1))));
        for _ in 0..3 {
            assert_eq!((id(&vm), vm.plug(0, disk()).unwrap()), (0, 0));
            assert_eq!(id(&vm), 2);
            assert!(matches!(vm.plug(0, disk()), Err(VmError::NoSlot(0))));
            // A driver that has begun loses the device as well.
            vm.mmio.write(place.address + 0x70, &3u32.to_le_bytes());
            vm.unplug(0).unwrap();
        }
    }

    #[test]
    fn descriptors_have_to_be_open_and_different() {
        let valid = largest();
        let mut closed = valid.clone();
        closed.kernel.fd = i32::MAX;
        let mut twice = valid.clone();
        twice.kernel.fd = twice.kvm_fd;
        let mut too_many = valid.clone();
        too_many.block.push(BlockConfig { file: file(), ..valid.block[0].clone() });
        for (config, message) in [
            (closed, "descriptor 2147483647 is not open"),
            (twice, "is given twice"),
            (too_many, "number of block and network devices is 16; it has to be from 0 to 15"),
        ] {
            // SAFETY: the configuration is not valid, so no descriptor is taken.
            let error = unsafe { Inherited::new(config) }.err().unwrap().to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn a_network_device_is_checked_before_it_is_made() {
        let valid = NetConfig {
            tap_fds: vec![file().fd],
            vhost_fds: Vec::new(),
            vhost_socket_fd: None,
            mac: [2, 0, 0, 0, 0, 1],
            mtu: Some(68),
        };
        let with =
            |net: &[NetConfig]| VmConfig { block: Vec::new(), net: net.to_vec(), ..largest() };
        with(std::slice::from_ref(&valid)).validate().unwrap();
        let change = |change: fn(&mut NetConfig)| {
            let mut net = valid.clone();
            change(&mut net);
            net
        };
        for (net, message) in [
            (
                change(|net| net.tap_fds.clear()),
                "number of net.tap_fds is 0; it has to be from 1 to 32",
            ),
            (change(|net| net.vhost_fds = vec![70, 71]), "has 2 descriptors for 1 of net.tap_fds"),
            (
                change(|net| (net.vhost_fds, net.vhost_socket_fd) = (vec![70], Some(71))),
                "none, or as many and no net.vhost_socket_fd",
            ),
            (
                change(|net| net.mac[0] = 3),
                "net.mac is \"03:00:00:00:00:01\"; it has to be the address",
            ),
            (change(|net| net.mac = [0; 6]), "net.mac is \"00:00:00:00:00:00\""),
            (change(|net| net.mtu = Some(67)), "net.mtu is 67; it has to be from 68 to 65535"),
            (change(|net| net.tap_fds.push(net.tap_fds[0])), "is given twice"),
        ] {
            let error = with(&[net]).validate().unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        let error = with(&vec![valid.clone(); 9]).validate().unwrap_err().to_string();
        assert_eq!(error, "number of network devices is 9; it has to be from 0 to 8");
        // A regular file is not a tap.
        let mut config = with(std::slice::from_ref(&valid));
        config.net[0].tap_fds = vec![file().fd];
        // SAFETY: `largest` and `file` gave the ownership of their descriptors up to the
        // configuration.
        let Inherited { config, mut descriptors } = unsafe { Inherited::new(config) }.unwrap();
        let error = new_net(&mut descriptors, 0, &config.net[0]).err().unwrap().to_string();
        assert!(error.starts_with("network device 0: queue 0 of its tap: "), "{error}");
    }
}

//! Boot of a microVM: from an open state directory to an agent that answers.

use std::{
    fs::File,
    os::{fd::AsRawFd, unix::net::UnixListener},
    path::Path,
    time::Duration,
};

use oci_spec::runtime::{Capability, Spec};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use isopod_protocol::{Hello, SHARED_TAG};
use isopod_vmm::config::{FileRef, FsCache, FsConfig, VmConfig, VsockConfig};

use crate::{
    bundle::Bundle,
    container_id::ContainerId,
    error::{Error, Explain, Result},
    host,
    microvm::{
        dns_proxy::DnsProxy, hello::GuestConnections, host_sockets::HostSockets,
        placement::Placement, share::Share, vmm::Vmm,
    },
    network::Network,
    settings::{self, Artifacts},
    state::{CONSOLE_LOG, StateDir, VSOCK_SOCKET},
    text::seconds,
};

/// The guest's context id. Any id will do: it is only visible inside the guest.
const GUEST_CID: u32 = 3;

/// Most threads that serve the share.
const MAX_FS_WORKERS: u8 = 4;

/// Settings for making a microVM, beside those of its container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct BootSettings {
    /// The files that the microVM is made of.
    pub artifacts: Artifacts,
    /// Parameters that the operator adds to the guest kernel's command line.
    pub kernel_params: String,
    /// True if the microVM shares the unchanging parts of its kernel with other microVMs.
    pub share_kernel: bool,
    /// Longest time for the guest to boot.
    pub timeout: Duration,
    /// True if the guest kernel's console is to be kept in the state directory.
    pub console_log: bool,
}

impl BootSettings {
    /// The settings of this host's operator.
    ///
    /// # Errors
    ///
    /// If a file of the microVM is missing, or a setting cannot be read.
    pub(crate) fn of_host(console_log: bool) -> Result<Self> {
        Ok(Self {
            artifacts: Artifacts::find()?,
            kernel_params: settings::kernel_params()?,
            share_kernel: settings::share_kernel()?,
            timeout: settings::boot_timeout()?,
            console_log,
        })
    }
}

/// The host's side of the devices that differ between microVMs.
pub(crate) struct Devices<'a> {
    /// Directories for the guest.
    pub share: &'a Share,
    /// Taps of the network devices.
    pub network: &'a mut Network,
    /// Number of places for disks.
    pub disk_slots: u8,
}

/// Opens all files that the microVM is made of, and starts the VMM with them.
pub(crate) fn start(
    id: &ContainerId,
    bundle: &Bundle,
    settings: &BootSettings,
    dir: &StateDir,
    devices: Devices<'_>,
    place: &Placement,
) -> Result<(Vmm, GuestConnections)> {
    let Devices { share, network, disk_slots } = devices;
    let kvm = host::open_kvm()?;
    let kernel = open(&settings.artifacts.kernel, "the guest kernel")?;
    let initramfs = open(&settings.artifacts.initramfs, "the guest image")?;
    let listener = UnixListener::bind(dir.short_path(VSOCK_SOCKET))
        .explain(|| format!("cannot listen at {}", dir.path().join(VSOCK_SOCKET).display()))?;
    let (connections, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .explain(|| "cannot make a socket pair".into())?;
    let console = if settings.console_log { Some(console_log(dir)?) } else { None };
    let config = VmConfig {
        id: id.to_string(),
        vcpus: bundle.vm.vcpus,
        memory_mib: bundle.vm.memory_mib,
        kvm_fd: kvm.as_raw_fd(),
        kernel: file_ref(&kernel, &settings.artifacts.kernel),
        initramfs: file_ref(&initramfs, &settings.artifacts.initramfs),
        cmdline: settings.kernel_params.clone(),
        nested: bundle.nested,
        share_kernel: settings.share_kernel,
        console_fd: console.as_ref().map(AsRawFd::as_raw_fd),
        // Filled in by `Vmm::spawn`, which makes the socket.
        control_fd: -1,
        vsock: VsockConfig {
            guest_cid: GUEST_CID,
            listen_fd: listener.as_raw_fd(),
            connect_fd: theirs.as_raw_fd(),
        },
        fs: Some(FsConfig {
            tag: SHARED_TAG.to_owned(),
            workers: bundle.vm.vcpus.min(MAX_FS_WORKERS),
            cache: FsCache::Auto,
            devices: makes_devices(&bundle.spec),
        }),
        block: Vec::new(),
        net: network.config(),
        disk_slots,
        jail_root_fd: Some(share.root().as_raw_fd()),
    };
    let connections = GuestConnections::new(connections)?;
    // All descriptors stay open up to here. From here on the VMM has its own copies.
    let vmm = Vmm::spawn(&settings.artifacts.vmm, config, place)?;
    network.hand_over();
    Ok((vmm, connections))
}

/// Returns true if a container may make block and character devices. In a pod the first container
/// decides.
fn makes_devices(spec: &Spec) -> bool {
    let capabilities = spec.process().as_ref().and_then(|process| process.capabilities().as_ref());
    capabilities
        .and_then(|sets| sets.bounding().as_ref())
        .is_some_and(|set| set.contains(&Capability::Mknod))
}

/// Waits for the agent's hello. If the microVM ends first, or takes longer than `limit`, the error
/// has the last lines of its console.
pub(crate) async fn wait_for_agent(
    vmm: &Vmm,
    connections: GuestConnections,
    resolver: Option<DnsProxy>,
    sockets: HostSockets,
    limit: Duration,
) -> Result<Hello> {
    let hello = tokio::select! {
        biased;
        hello = timeout(limit, connections.hello()) => hello,
        end = vmm.ended() => {
            let error = end.explain_boot();
            return Err(if end.is_of_the_guest() { hint(error) } else { error });
        }
    };
    match hello {
        Ok(result) => {
            tokio::spawn(connections.serve(resolver, sockets));
            result
        }
        Err(_) => Err(hint(
            Error::new(format!(
                "the guest did not become ready within {} (set ISOPOD_BOOT_TIMEOUT to wait \
                 longer)",
                seconds(limit)
            ))
            .details(vmm.stop().await.explain().details),
        )),
    }
}

/// Adds a hint to an error if the guest's console is empty: a way to see the kernel's log.
/// `--debug` is no such way, since its log goes with the state directory.
fn hint(mut error: Error) -> Error {
    if error.details.is_empty() {
        error.message.push_str(
            "; its console is empty: set ISOPOD_KERNEL_PARAMS=loglevel=7 to see the log of its kernel",
        );
    }
    error
}

fn open(path: &Path, what: &str) -> Result<File> {
    File::open(path).explain(|| format!("cannot open {what} {}", path.display()))
}

fn console_log(dir: &StateDir) -> Result<File> {
    File::options()
        .create(true)
        .append(true)
        .open(dir.short_path(CONSOLE_LOG))
        .explain(|| format!("cannot open {}", dir.path().join(CONSOLE_LOG).display()))
}

fn file_ref(file: &File, path: &Path) -> FileRef {
    FileRef { fd: file.as_raw_fd(), path: path.display().to_string() }
}

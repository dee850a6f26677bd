//! From an open state directory to an agent that answers.

use std::{
    fs::File,
    os::{fd::AsRawFd, unix::net::UnixListener},
    path::Path,
    time::Duration,
};

use oci_spec::runtime::{Capability, Spec};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use tokio::time::timeout;

use isopod_protocol::{Hello, SHARED_TAG};
use isopod_vmm::config::{FileRef, FsCache, FsConfig, VmConfig, VsockConfig};

use super::{
    launch::Launch, machine::Machine, ready::GuestConnections, resolver::Resolver, share::Share,
    vmm::Vmm,
};
use crate::{
    error::{Error, ErrorKind, Explain, Result},
    host,
    network::Network,
    state::{CONSOLE_LOG, StateDir, VSOCK_SOCKET},
};

/// The guest's context id. One is as good as another: it is only visible inside the guest.
const GUEST_CID: u32 = 3;

/// Most threads that serve the shared directory.
const MAX_FS_WORKERS: u8 = 4;

/// How long to wait for the VMM to say why a connection to the guest broke.
const REASON_TIMEOUT: Duration = Duration::from_secs(2);

/// Opens everything that the microVM is made of and starts the VMM with it.
///
/// # Errors
///
/// If something is missing or not permitted.
pub(super) fn start(
    launch: &Launch,
    dir: &StateDir,
    share: &Share,
    network: &mut Network,
) -> Result<(Vmm, GuestConnections)> {
    let kvm = host::open_kvm()?;
    let kernel = open(&launch.artifacts.kernel, "the guest kernel")?;
    let initramfs = open(&launch.artifacts.initramfs, "the guest image")?;
    let listener = UnixListener::bind(dir.short_path(VSOCK_SOCKET))
        .explain(|| format!("cannot listen at {}", dir.path().join(VSOCK_SOCKET).display()))?;
    let (connections, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .explain(|| "cannot make a socket pair".into())?;
    let console = if launch.console_log { Some(console_log(dir)?) } else { None };
    let config = VmConfig {
        id: launch.id.to_string(),
        vcpus: launch.vm.vcpus,
        memory_mib: launch.vm.memory_mib,
        kvm_fd: kvm.as_raw_fd(),
        kernel: file_ref(&kernel, &launch.artifacts.kernel),
        initramfs: file_ref(&initramfs, &launch.artifacts.initramfs),
        cmdline: launch.kernel_params.clone(),
        nested: launch.nested,
        share_kernel: launch.share_kernel,
        console_fd: console.as_ref().map(AsRawFd::as_raw_fd),
        // Filled in by whoever has the other end.
        control_fd: -1,
        vsock: VsockConfig {
            guest_cid: GUEST_CID,
            listen_fd: listener.as_raw_fd(),
            connect_fd: theirs.as_raw_fd(),
        },
        fs: Some(FsConfig {
            tag: SHARED_TAG.to_owned(),
            workers: launch.vm.vcpus.min(MAX_FS_WORKERS),
            cache: FsCache::Auto,
            devices: makes_devices(&launch.spec),
        }),
        block: Vec::new(),
        net: network.config(),
        jail_root_fd: Some(share.root().as_raw_fd()),
    };
    let connections = GuestConnections::new(connections)?;
    // All descriptors stay open to here, and the VMM has its own copies from here.
    let vmm = Vmm::spawn(&launch.artifacts.vmm, config)?;
    network.hand_over();
    Ok((vmm, connections))
}

/// Whether a container may make block and character devices. In a pod, the first one's word counts.
fn makes_devices(spec: &Spec) -> bool {
    let capabilities = spec.process().as_ref().and_then(|process| process.capabilities().as_ref());
    capabilities
        .and_then(|sets| sets.bounding().as_ref())
        .is_some_and(|set| set.contains(&Capability::Mknod))
}

/// Waits for the agent's hello.
///
/// # Errors
///
/// If the microVM ends first or takes longer than `limit`, with the last lines of its console.
pub(super) async fn wait_for_agent(
    vmm: &Vmm,
    connections: GuestConnections,
    resolver: Option<Resolver>,
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
            tokio::spawn(connections.serve(resolver));
            result
        }
        Err(_) => Err(hint(
            Error::new(format!(
                "the guest did not become ready within {} seconds (set ISOPOD_BOOT_TIMEOUT to wait \
                 longer)",
                limit.as_secs()
            ))
            .details(vmm.stop().await.explain().details),
        )),
    }
}

/// Names the way to more where the guest's console has not said anything. The log that
/// `--debug` keeps is no such way: it goes with the state directory.
fn hint(mut error: Error) -> Error {
    if error.details.is_empty() {
        error.message.push_str(
            "; its console is empty: set ISOPOD_KERNEL_PARAMS=loglevel=7 to see the log of its kernel",
        );
    }
    error
}

/// Does something that needs the guest, within `limit`. If the microVM ends meanwhile, the failure
/// says why.
///
/// # Errors
///
/// The failure of `action`, that of the microVM, or that it took too long.
pub(super) async fn in_guest<T>(
    machine: &Machine,
    what: &str,
    limit: Duration,
    action: impl Future<Output = Result<T>>,
) -> Result<T> {
    tokio::select! {
        biased;
        result = timeout(limit, action) => match result {
            Ok(Err(error)) if error.kind == ErrorKind::VmLost => Err(loss(machine, error).await),
            Ok(result) => result,
            Err(_) => Err(Error::new(format!(
                "{what} took longer than {} seconds in the guest", limit.as_secs()
            ))),
        },
        end = machine.ended() => Err(end.explain()),
    }
}

/// Why a connection to the guest broke: what the VMM says, if it ends too, or else `error`.
pub(super) async fn loss(machine: &Machine, error: Error) -> Error {
    match timeout(REASON_TIMEOUT, machine.ended()).await {
        Ok(end) => end.explain(),
        Err(_) => Error { kind: ErrorKind::VmLost, ..error },
    }
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

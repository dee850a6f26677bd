//! A boot of `isopod-vmm`, with configuration and descriptors like those of the sandbox process.

use std::fs::File;
use std::io::{BufRead as _, BufReader, IoSliceMut, Seek as _, Write as _};
use std::os::fd::{AsRawFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command};

use anyhow::{Context as _, Result, bail};
use isopod_protocol::{Hello, SHARED_TAG};
use isopod_vmm::config::{FileRef, FsCache, FsConfig, VmConfig, VsockConfig};
use isopod_vmm::control::{MAX_MESSAGE_LEN, VmmAction, VmmEvent, VmmMessage, VmmReply};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, socketpair,
};
use tempfile::TempDir;

use crate::clock;

/// Memory of Isopod's and of QEMU's guest in MiB.
pub(crate) const MEMORY_MIB: u64 = 256;

/// Figures of a boot.
pub(crate) struct VmmBoot {
    /// Units from the exec of the VMM to the agent's ready message.
    pub(crate) units: f64,
    /// The agent's ready message.
    pub(crate) hello: Hello,
    /// Number of exits until the ready message, by kind.
    pub(crate) exits: Vec<(String, u64)>,
    /// Resident memory of the VMM in KiB, without guest memory.
    pub(crate) overhead_kib: u64,
    /// Resident guest memory in KiB.
    pub(crate) guest_resident_kib: u64,
}

/// Boots once and ends the microVM.
pub(crate) fn boot(programs: &Path) -> Result<VmmBoot> {
    let share = Share::new()?;
    let (control, vmm_control) = seqpacket_pair()?;
    let (connect, vmm_connect) = seqpacket_pair()?;
    let listener = UnixListener::bind(share.0.path().join("vsock.sock"))?;
    let open = |name: &str| -> Result<(File, String)> {
        let path = programs.join(name);
        let file = File::open(&path).with_context(|| path.display().to_string())?;
        Ok((file, path.display().to_string()))
    };
    let kvm = File::options().read(true).write(true).open("/dev/kvm").context("/dev/kvm")?;
    let (kernel, kernel_path) = open("vmlinux")?;
    let (initramfs, initramfs_path) = open("isopod.initramfs")?;
    let root = File::open(share.0.path())?;
    let config = VmConfig {
        id: "bench".to_owned(),
        vcpus: 1,
        memory_mib: MEMORY_MIB,
        kvm_fd: kvm.as_raw_fd(),
        kernel: FileRef { fd: kernel.as_raw_fd(), path: kernel_path },
        initramfs: FileRef { fd: initramfs.as_raw_fd(), path: initramfs_path },
        cmdline: String::new(),
        nested: false,
        share_kernel: false,
        console_fd: None,
        control_fd: vmm_control.as_raw_fd(),
        vsock: VsockConfig {
            guest_cid: 3,
            listen_fd: listener.as_raw_fd(),
            connect_fd: vmm_connect.as_raw_fd(),
        },
        fs: Some(FsConfig {
            tag: SHARED_TAG.to_owned(),
            workers: 2,
            cache: FsCache::Auto,
            devices: false,
        }),
        block: Vec::new(),
        net: Vec::new(),
        disk_slots: 0,
        jail_root_fd: Some(root.as_raw_fd()),
    };
    let config_file = config_file(&config)?;
    for fd in config.descriptors() {
        inherit(fd)?;
    }
    let start = clock::now()?;
    let mut child = Command::new(programs.join("isopod-vmm"))
        .args(["--config-fd", &config_file.as_raw_fd().to_string()])
        .spawn()
        .context("isopod-vmm")?;
    drop((vmm_control, vmm_connect));
    let boot = finish(&control, &connect, start);
    stop(&control, &mut child)?;
    boot
}

/// Waits for the ready message and asks the VMM for its status.
fn finish(control: &UnixDatagram, connect: &UnixDatagram, start: f64) -> Result<VmmBoot> {
    let hello = receive_hello(connect).map_err(|e| match end_of(control) {
        Some(why) => anyhow::anyhow!("the microVM ended: {why}"),
        None => e,
    })?;
    let units = clock::now()? - start;
    control.send(&serde_json::to_vec(&VmmAction::Status)?)?;
    loop {
        match receive(control)?.context("the VMM has ended")? {
            VmmMessage::Reply(VmmReply::Status {
                exits, overhead_kib, guest_resident_kib, ..
            }) => {
                let exits = exits.into_iter().collect();
                return Ok(VmmBoot { units, hello, exits, overhead_kib, guest_resident_kib });
            }
            VmmMessage::Event(VmmEvent::Started { .. } | VmmEvent::FilesHigh) => {}
            other => bail!("the VMM said {other:?}"),
        }
    }
}

/// Ends the microVM, even after a failed boot.
fn stop(control: &UnixDatagram, child: &mut Child) -> Result<()> {
    // Fails if the microVM has ended by itself.
    let _ = control.send(&serde_json::to_vec(&VmmAction::Stop)?);
    child.wait().context("waiting for isopod-vmm")?;
    Ok(())
}

/// The VMM's message about its end, if it has ended.
fn end_of(control: &UnixDatagram) -> Option<String> {
    while let Ok(Some(message)) = receive(control) {
        if !matches!(message, VmmMessage::Event(VmmEvent::Started { .. })) {
            return Some(format!("{message:?}"));
        }
    }
    None
}

/// Receives a message of the VMM; none if the VMM has closed the socket.
fn receive(control: &UnixDatagram) -> Result<Option<VmmMessage>> {
    let mut packet = vec![0; MAX_MESSAGE_LEN];
    let len = control.recv(&mut packet)?;
    Ok((len > 0).then(|| serde_json::from_slice(&packet[..len])).transpose()?)
}

/// Receives the agent's connection, and reads the ready message from it.
fn receive_hello(connect: &UnixDatagram) -> Result<Hello> {
    let mut port = [0u8; 4];
    let mut space = nix::cmsg_space!(RawFd);
    let mut buffers = [IoSliceMut::new(&mut port)];
    let message = recvmsg::<()>(
        connect.as_raw_fd(),
        &mut buffers,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )
    .context("waiting for the guest to connect")?;
    let fd = message
        .cmsgs()?
        .find_map(|message| match message {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        })
        .context("the guest never connected")?;
    // SAFETY: the kernel has just made this descriptor for us.
    let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    serde_json::from_str(&line).with_context(|| format!("the agent said {line:?}"))
}

/// An empty directory that is a mount with shared propagation, as the jail needs it.
struct Share(TempDir);

impl Share {
    fn new() -> Result<Self> {
        let share = Self(tempfile::tempdir()?);
        let nothing: Option<&str> = None;
        mount(Some(share.0.path()), share.0.path(), nothing, MsFlags::MS_BIND, nothing)?;
        mount(nothing, share.0.path(), nothing, MsFlags::MS_SHARED, nothing)?;
        Ok(share)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if let Err(error) = umount2(self.0.path(), MntFlags::MNT_DETACH) {
            eprintln!("isopod-bench: unmounting {}: {error}", self.0.path().display());
        }
    }
}

fn seqpacket_pair() -> Result<(UnixDatagram, OwnedFd)> {
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    Ok((ours.into(), theirs))
}

/// Writes the configuration to a temporary file that the VMM inherits.
fn config_file(config: &VmConfig) -> Result<File> {
    let mut file = tempfile::tempfile()?;
    file.write_all(&serde_json::to_vec(config)?)?;
    file.rewind()?;
    inherit(file.as_raw_fd())?;
    Ok(file)
}

/// Clears close-on-exec: the next child inherits the descriptor under the same number.
fn inherit(fd: RawFd) -> Result<()> {
    // SAFETY: the caller owns the descriptor and keeps it open.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(())
}

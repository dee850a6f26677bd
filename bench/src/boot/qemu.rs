//! A boot of QEMU's microvm machine, with Isopod's guest kernel and guest image.

use std::io::{BufRead as _, BufReader};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::path::Path;
use std::process::{ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use isopod_protocol::{Hello, READY_PORT};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vsock::{VMADDR_CID_ANY, VsockListener};

use crate::child_guard::ChildGuard;
use crate::clock;
use crate::qemu::{self, QemuGuest};
use crate::vmm::MEMORY_MIB;

/// Context id of the guest: not the default, which another microVM of this host may have.
const GUEST_CID: u32 = 4242;

/// Figures of a boot.
pub(super) struct QemuBoot {
    /// Units from the exec of QEMU to the agent's ready message.
    pub(super) units: f64,
    /// The agent's ready message.
    pub(super) hello: Hello,
    /// Resident memory of QEMU in KiB, without guest memory.
    pub(super) overhead_kib: u64,
}

/// Boots once and ends the machine.
///
/// Option ROMs are off, like the devices of [`QemuGuest`] that the guest does not need.
pub(super) fn boot(programs: &Path) -> Result<QemuBoot> {
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, READY_PORT)
        .context("listening on vsock (is vhost_vsock loaded?)")?;
    let start = clock::now()?;
    let guest = QemuGuest {
        machine: ",x-option-roms=off",
        memory_mib: MEMORY_MIB,
        programs,
        image: &programs.join("isopod.initramfs"),
        kernel_params: "reboot=k",
    };
    let mut child = guest
        .configure(&mut Command::new(qemu::PROGRAM))
        .args(["-device", &format!("vhost-vsock-device,guest-cid={GUEST_CID}")])
        .args(["-device", "virtio-rng-device", "-device", "virtio-balloon-device"])
        // QEMU writes nothing to the pipe. Its end closes the pipe, which poll reports.
        .stdout(Stdio::piped())
        .spawn()
        .context(qemu::PROGRAM)?;
    let stdout = child.stdout.take().context("QEMU has no standard output")?;
    let mut machine = Machine(ChildGuard(child));
    machine.wait_for_guest(&listener, &stdout)?;
    let (stream, _) = listener.accept()?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).context("waiting for the agent's message")?;
    let units = clock::now()? - start;
    let hello = serde_json::from_str(&line).with_context(|| format!("the agent said {line:?}"))?;
    Ok(QemuBoot { units, hello, overhead_kib: machine.overhead_kib()? })
}

/// A running QEMU.
struct Machine(ChildGuard);

impl Machine {
    /// Waits for a connection from the guest, or for the end of QEMU.
    fn wait_for_guest(&mut self, listener: &VsockListener, stdout: &ChildStdout) -> Result<()> {
        // SAFETY: the listener keeps its descriptor open, and outlives this function.
        let listener = unsafe { BorrowedFd::borrow_raw(listener.as_raw_fd()) };
        let mut fds = [
            PollFd::new(listener, PollFlags::POLLIN),
            PollFd::new(stdout.as_fd(), PollFlags::empty()),
        ];
        poll(&mut fds, PollTimeout::NONE)?;
        if fds[0].any() == Some(true) {
            return Ok(());
        }
        bail!("QEMU ended before its guest was ready: {}", self.0.0.wait()?)
    }

    /// Resident memory without the largest mapping, which is the guest's memory.
    fn overhead_kib(&self) -> Result<u64> {
        let path = format!("/proc/{}/smaps", self.0.0.id());
        let smaps = std::fs::read_to_string(&path).context(path)?;
        let field = |name: &str| -> Vec<u64> {
            smaps
                .lines()
                .filter_map(|line| line.strip_prefix(name))
                .filter_map(|kib| kib.trim().trim_end_matches(" kB").parse().ok())
                .collect()
        };
        let (sizes, resident) = (field("Size:"), field("Rss:"));
        let guest = sizes.iter().zip(&resident).max().map_or(0, |(_, resident)| *resident);
        Ok(resident.iter().sum::<u64>() - guest)
    }
}

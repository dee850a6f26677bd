//! QEMU's microvm machine with the same kernel and image, as the peer of a boot.

use std::io::{BufRead as _, BufReader};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use isopod_protocol::{Hello, READY_PORT};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vsock::{VMADDR_CID_ANY, VsockListener};

use crate::clock;
use crate::vmm::MEMORY_MIB;

/// Not the guest's default, so that no other microVM of this host is in the way.
const GUEST_CID: u32 = 4242;

/// What one boot cost.
pub(crate) struct Boot {
    /// From exec of QEMU to the agent's ready message.
    pub(crate) units: f64,
    /// The agent's message.
    pub(crate) hello: Hello,
    /// Resident memory of QEMU without guest memory.
    pub(crate) overhead_kib: u64,
}

/// Boots once and ends the machine.
///
/// Everything that the guest does not need is off, as for us: no legacy timer or interrupt
/// controller, no real-time clock, no serial port, no option ROMs.
pub(crate) fn boot(programs: &Path) -> Result<Boot> {
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, READY_PORT)
        .context("listening on vsock (is vhost_vsock loaded?)")?;
    let start = clock::now()?;
    let mut child = Command::new("qemu-system-x86_64")
        .args(["-M", "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=off,x-option-roms=off"])
        .args(["-accel", "kvm", "-cpu", "host", "-smp", "1", "-m", &format!("{MEMORY_MIB}M")])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .arg("-kernel")
        .arg(programs.join("vmlinux"))
        .arg("-initrd")
        .arg(programs.join("isopod.initramfs"))
        .args(["-append", "quiet panic=-1 reboot=k random.trust_cpu=on rdinit=/init"])
        .args(["-device", &format!("vhost-vsock-device,guest-cid={GUEST_CID}")])
        .args(["-device", "virtio-rng-device", "-device", "virtio-balloon-device"])
        .stdin(Stdio::null())
        // It writes nothing there; that the pipe is closed shows its end.
        .stdout(Stdio::piped())
        .spawn()
        .context("qemu-system-x86_64")?;
    let stdout = child.stdout.take().context("QEMU has no standard output")?;
    let mut machine = Machine(child);
    machine.wait_for_guest(&listener, &stdout)?;
    let (stream, _) = listener.accept()?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).context("waiting for the agent's message")?;
    let units = clock::now()? - start;
    let hello = serde_json::from_str(&line).with_context(|| format!("the agent said {line:?}"))?;
    Ok(Boot { units, hello, overhead_kib: machine.overhead_kib()? })
}

/// A running QEMU, ended when dropped.
struct Machine(Child);

impl Machine {
    /// Waits for a connection from the guest, not longer than QEMU lives.
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
        bail!("QEMU ended before its guest was ready: {}", self.0.wait()?)
    }

    /// Resident memory that is not the guest's, by the largest mapping being the guest's.
    fn overhead_kib(&self) -> Result<u64> {
        let path = format!("/proc/{}/smaps", self.0.id());
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

impl Drop for Machine {
    fn drop(&mut self) {
        // It has ended already if this fails.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

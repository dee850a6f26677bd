//! QEMU's microvm machine with Isopod's guest kernel: the peer of Isopod's microVM.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Result;
use isopod_rootfs_builder::cpio::{Device, Writer};

/// QEMU's program.
pub(crate) const PROGRAM: &str = "qemu-system-x86_64";

/// The machine, without legacy timer, interrupt controller, real-time clock and serial port.
///
/// Isopod's guests have none of these devices either.
const MACHINE: &str = "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=off";

/// Kernel command line of every guest.
const CMDLINE: &str = "quiet panic=-1 random.trust_cpu=on rdinit=/init";

/// A guest of one vCPU, without its devices.
pub(crate) struct QemuGuest<'a> {
    /// Further properties of the machine, each with a comma in front.
    pub(crate) machine: &'a str,
    /// Memory in MiB.
    pub(crate) memory_mib: u64,
    /// Folder of `vmlinux`.
    pub(crate) programs: &'a Path,
    /// The initramfs.
    pub(crate) image: &'a Path,
    /// Parameters behind the common kernel command line.
    pub(crate) kernel_params: &'a str,
}

impl QemuGuest<'_> {
    /// Adds the options of this guest to `command`, which runs [`PROGRAM`].
    ///
    /// Standard input becomes `/dev/null`.
    pub(crate) fn configure<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        command
            .args(["-M", &format!("{MACHINE}{}", self.machine)])
            .args(["-accel", "kvm", "-cpu", "host", "-smp", "1"])
            .args(["-m", &format!("{}M", self.memory_mib)])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .arg("-kernel")
            .arg(self.programs.join("vmlinux"))
            .arg("-initrd")
            .arg(self.image)
            .args(["-append", &format!("{CMDLINE} {}", self.kernel_params)])
            .stdin(Stdio::null())
    }
}

/// Writes an initramfs with `directories`, a console, busybox, `programs`, and `script` as `/init`.
///
/// A program is its path in the archive and its file on this machine.
pub(crate) fn write_image(
    image: &Path,
    directories: &[&str],
    programs: &[(&str, &Path)],
    script: &str,
) -> Result<()> {
    let mut content = Vec::new();
    let mut archive = Writer::new(&mut content);
    for name in directories {
        archive.directory(name, 0o755)?;
    }
    archive.character_device("dev/console", 0o600, Device { major: 5, minor: 1 })?;
    archive.file("bin/busybox", 0o755, &fs::read("/bin/busybox")?)?;
    for (name, file) in programs {
        archive.file(name, 0o755, &fs::read(file)?)?;
    }
    archive.file("init", 0o755, script.as_bytes())?;
    archive.finish()?;
    Ok(fs::write(image, content)?)
}

//! QEMU's virtio-net with the same guest kernel, behind a tap that is redirected as ours is.

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};

use anyhow::{Context as _, Result};
use isopod_rootfs_builder::cpio::{Device, Writer};

use super::KERNEL_PARAMS;
use super::namespace::{CONTAINER, INTERFACE, Namespace};
use crate::vmm::MEMORY_MIB;

const TAP: &str = "tap0";

/// A running QEMU, ended when dropped.
pub(super) struct Machine(Child);

impl Machine {
    /// Boots a guest that has the namespace's interface, and in which `program` is the traffic's peer
    /// for `address`. `dir` is for its image.
    ///
    /// # Errors
    ///
    /// If anything of it fails.
    pub(super) fn boot(
        namespace: &Namespace,
        programs: &Path,
        program: &Path,
        address: &str,
        dir: &Path,
    ) -> Result<Self> {
        let image = dir.join("peer.initramfs");
        write_image(&image, program, address).context("the image of QEMU's guest")?;
        redirect(namespace)?;
        let show = namespace.run("cat", &[&format!("/sys/class/net/{INTERFACE}/address")])?;
        let vhost = if Path::new("/dev/vhost-net").exists() { "on" } else { "off" };
        let child = namespace
            .command("qemu-system-x86_64")
            .args(["-M", "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=off"])
            .args(["-accel", "kvm", "-cpu", "host", "-smp", "1", "-m", &format!("{MEMORY_MIB}M")])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .arg("-kernel")
            .arg(programs.join("vmlinux"))
            .arg("-initrd")
            .arg(&image)
            .arg("-append")
            .arg(format!(
                "quiet panic=-1 reboot=k random.trust_cpu=on rdinit=/init {KERNEL_PARAMS}"
            ))
            .arg("-netdev")
            .arg(format!("tap,id=net,ifname={TAP},script=no,downscript=no,vhost={vhost}"))
            .arg("-device")
            .arg(format!("virtio-net-device,netdev=net,mac={}", show.trim()))
            .stdin(Stdio::null())
            .spawn()
            .context("qemu-system-x86_64")?;
        Ok(Self(child))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It has ended already if this fails.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A tap to which the interface's traffic goes, and back.
fn redirect(namespace: &Namespace) -> Result<()> {
    namespace.run("ip", &["tuntap", "add", TAP, "mode", "tap", "vnet_hdr"])?;
    namespace.run("ip", &["link", "set", TAP, "up"])?;
    for (from, to) in [(INTERFACE, TAP), (TAP, INTERFACE)] {
        namespace.run("tc", &["qdisc", "add", "dev", from, "ingress"])?;
        let filter = ["filter", "add", "dev", from, "ingress", "protocol", "all", "matchall"];
        let action = ["action", "mirred", "egress", "redirect", "dev", to];
        namespace.run("tc", &[&filter[..], &action].concat())?;
    }
    Ok(())
}

fn write_image(image: &Path, program: &Path, address: &str) -> Result<()> {
    let script = format!(
        "#!/bin/busybox sh\n/bin/busybox ip address add {CONTAINER} dev {INTERFACE}\n\
         /bin/busybox ip link set {INTERFACE} up\nexec /bin/isopod-bench peer {address}\n"
    );
    let mut content = Vec::new();
    let mut archive = Writer::new(&mut content);
    for name in ["bin", "dev", "proc", "sys"] {
        archive.directory(name, 0o755)?;
    }
    archive.character_device("dev/console", 0o600, Device { major: 5, minor: 1 })?;
    archive.file("bin/busybox", 0o755, &fs::read("/bin/busybox")?)?;
    archive.file("bin/isopod-bench", 0o755, &fs::read(program)?)?;
    archive.file("init", 0o755, script.as_bytes())?;
    archive.finish()?;
    Ok(fs::write(image, content)?)
}

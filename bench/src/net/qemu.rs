//! A guest of QEMU with virtio-net, behind a tap with the same redirection as Isopod's tap.

use std::path::Path;

use anyhow::{Context as _, Result};

use super::namespace::{CONTAINER, INTERFACE, Namespace};
use crate::child_guard::ChildGuard;
use crate::guest::KERNEL_PARAMS;
use crate::qemu::{self, QemuGuest};
use crate::vmm::MEMORY_MIB;

const TAP: &str = "tap0";

/// Boots a guest with the namespace's interface. `program` runs in it as the peer for `address`.
///
/// The image is written to `dir`. QEMU ends when the value is dropped.
pub(super) fn boot(
    namespace: &Namespace,
    programs: &Path,
    program: &Path,
    address: &str,
    dir: &Path,
) -> Result<ChildGuard> {
    let image = dir.join("peer.initramfs");
    let script = format!(
        "#!/bin/busybox sh\n/bin/busybox ip address add {CONTAINER} dev {INTERFACE}\n\
         /bin/busybox ip link set {INTERFACE} up\nexec /bin/isopod-bench peer {address}\n"
    );
    let bench = [("bin/isopod-bench", program)];
    qemu::write_image(&image, &["bin", "dev", "proc", "sys"], &bench, &script)
        .context("the image of QEMU's guest")?;
    redirect(namespace)?;
    let show = namespace.run("cat", &[&format!("/sys/class/net/{INTERFACE}/address")])?;
    let vhost = if Path::new("/dev/vhost-net").exists() { "on" } else { "off" };
    let guest = QemuGuest {
        machine: "",
        memory_mib: MEMORY_MIB,
        programs,
        image: &image,
        kernel_params: &format!("reboot=k {KERNEL_PARAMS}"),
    };
    let child = guest
        .configure(&mut namespace.command(qemu::PROGRAM))
        .arg("-netdev")
        .arg(format!("tap,id=net,ifname={TAP},script=no,downscript=no,vhost={vhost}"))
        .arg("-device")
        .arg(format!("virtio-net-device,netdev=net,mac={}", show.trim()))
        .spawn()
        .context(qemu::PROGRAM)?;
    Ok(ChildGuard(child))
}

/// Makes a tap, and redirects the traffic between the tap and the namespace's interface.
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

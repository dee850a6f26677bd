//! The peer: a guest of QEMU with Debian's virtiofsd. One share has both directories.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use super::ground::Ground;
use super::guest::{MEMORY_MIB, PROGRAM, VOLUME};
use crate::child_guard::ChildGuard;
use crate::guest::KERNEL_PARAMS;
use crate::qemu::{self, QemuGuest};

/// Tag of the share.
const TAG: &str = "files";

/// Does the work in a guest and waits for the end of QEMU.
pub(super) fn run(programs: &Path, server: &Path, ground: &Ground) -> Result<()> {
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let image = dir.path().join("files.initramfs");
    write_image(&image).context("the image of QEMU's guest")?;
    let socket = dir.path().join("virtiofsd.sock");
    let _server = serve(server, ground.dir(), &socket)?;
    let guest = QemuGuest {
        machine: ",memory-backend=mem",
        memory_mib: MEMORY_MIB,
        programs,
        image: &image,
        // reboot=t: the guest ends the machine with a triple fault.
        kernel_params: &format!("reboot=t {KERNEL_PARAMS}"),
    };
    let status = guest
        .configure(&mut Command::new(qemu::PROGRAM))
        // virtiofsd needs a virtio 1.0 device. The machine's default is legacy.
        .args(["-global", "virtio-mmio.force-legacy=false"])
        // virtiofsd maps the guest's memory, so the memory is a shared memfd.
        .arg("-object")
        .arg(format!("memory-backend-memfd,id=mem,size={MEMORY_MIB}M,share=on"))
        .arg("-chardev")
        .arg(format!("socket,id=files,path={}", socket.display()))
        .args(["-device", &format!("vhost-user-fs-device,chardev=files,tag={TAG}")])
        .status()
        .context(qemu::PROGRAM)?;
    // Empty if the work has succeeded. Missing if the guest did not start it.
    let said =
        fs::read_to_string(ground.volume().join(SAID)).context("QEMU's guest did nothing")?;
    if !status.success() || !said.is_empty() {
        bail!("QEMU's guest: {status}: {}", said.trim());
    }
    Ok(())
}

/// File on the volume with the output of the work. The guest has no console.
const SAID: &str = "said";

/// Starts virtiofsd for `dir`, and returns when its socket exists. virtiofsd ends with QEMU.
///
/// Its options are Debian's defaults, with extended attributes, and without a thread pool: a pool
/// costs more time than it saves.
fn serve(program: &Path, dir: &Path, socket: &Path) -> Result<ChildGuard> {
    let mut command = Command::new(program);
    // QEMU's virtiofsd (C) and the separate package's (Rust) have different options.
    if program.ends_with("qemu/virtiofsd") {
        command.arg("-o").arg(format!("source={}", dir.display()));
        command.args(["-o", "cache=auto", "-o", "xattr", "-o", "sandbox=chroot"]);
    } else {
        command.arg("--shared-dir").arg(dir);
        command.args(["--cache", "auto", "--xattr", "--sandbox", "chroot"]);
    }
    command.arg(format!("--socket-path={}", socket.display())).arg("--thread-pool-size=0");
    let child =
        command.stdin(Stdio::null()).spawn().with_context(|| program.display().to_string())?;
    let mut server = ChildGuard(child);
    while !socket.exists() {
        if let Some(status) = server.0.try_wait().context("virtiofsd")? {
            bail!("virtiofsd ended before it listened: {status}");
        }
        std::thread::yield_now();
    }
    Ok(server)
}

/// Writes the guest's initramfs.
///
/// Its script mounts the share; in the tree it mounts volume, proc, dev and tmp. Then it does the
/// work in the tree.
fn write_image(image: &Path) -> Result<()> {
    let script = format!(
        "#!/bin/busybox sh\n\
         b=/bin/busybox\n\
         $b mount -t virtiofs {TAG} /share &&\n\
         $b mount -o bind /share/volume /share/root{VOLUME} &&\n\
         $b mount -t proc proc /share/root/proc &&\n\
         $b mount -t devtmpfs dev /share/root/dev &&\n\
         $b mount -t tmpfs tmpfs /share/root/tmp &&\n\
         PATH=/usr/sbin:/usr/bin:/sbin:/bin $b chroot /share/root {PROGRAM} work {VOLUME} \
         >/share/volume/{SAID} 2>&1\n\
         $b reboot -f\n"
    );
    qemu::write_image(image, &["bin", "dev", "proc", "share"], &[], &script)
}

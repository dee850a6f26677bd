//! The peer: QEMU's microvm machine with Debian's virtiofsd, which serves both directories as one.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use isopod_rootfs_builder::cpio::{Device, Writer};

use super::ground::Ground;
use super::{KERNEL_PARAMS, MEMORY_MIB, PROGRAM, VOLUME};

/// The name of the share.
const TAG: &str = "files";

/// Does the work in a guest and waits for its end.
///
/// # Errors
///
/// If QEMU, virtiofsd or the work fails.
pub(super) fn run(programs: &Path, server: &Path, ground: &Ground) -> Result<()> {
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let image = dir.path().join("files.initramfs");
    write_image(&image).context("the image of QEMU's guest")?;
    let socket = dir.path().join("virtiofsd.sock");
    let _server = serve(server, ground.dir(), &socket)?;
    let status = Command::new("qemu-system-x86_64")
        .args(["-M", "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=off,memory-backend=mem"])
        // virtiofsd takes no device of before virtio 1.0, which is this machine's default.
        .args(["-global", "virtio-mmio.force-legacy=false"])
        .args(["-accel", "kvm", "-cpu", "host", "-smp", "1", "-m", &format!("{MEMORY_MIB}M")])
        // The server maps the guest's memory.
        .arg("-object")
        .arg(format!("memory-backend-memfd,id=mem,size={MEMORY_MIB}M,share=on"))
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .arg("-kernel")
        .arg(programs.join("vmlinux"))
        .arg("-initrd")
        .arg(&image)
        .arg("-append")
        .arg(format!(
            // The machine ends with a triple fault.
            "quiet panic=-1 reboot=t random.trust_cpu=on rdinit=/init {KERNEL_PARAMS}"
        ))
        .arg("-chardev")
        .arg(format!("socket,id=files,path={}", socket.display()))
        .args(["-device", &format!("vhost-user-fs-device,chardev=files,tag={TAG}")])
        .stdin(Stdio::null())
        .status()
        .context("qemu-system-x86_64")?;
    // Empty when all went well. Missing when the guest did not get so far.
    let said =
        fs::read_to_string(ground.volume().join(SAID)).context("QEMU's guest did nothing")?;
    if !status.success() || !said.is_empty() {
        bail!("QEMU's guest: {status}: {}", said.trim());
    }
    Ok(())
}

/// What the work has said, on the volume: the guest has no console.
const SAID: &str = "said";

/// virtiofsd, ended when dropped; it ends by itself with QEMU.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It has ended already if this fails.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Serves `dir` as Debian's default is, with extended attributes and without a pool of threads, which costs it
/// more than it gains. Returns when the socket is there.
fn serve(program: &Path, dir: &Path, socket: &Path) -> Result<Server> {
    let mut command = Command::new(program);
    // QEMU's own takes other options than the one that has a package.
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
    let mut server = Server(child);
    while !socket.exists() {
        if let Some(status) = server.0.try_wait().context("virtiofsd")? {
            bail!("virtiofsd ended before it listened: {status}");
        }
        std::thread::yield_now();
    }
    Ok(server)
}

/// Mounts the share, gives the tree what a container would have there, and does the work in it.
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
    let mut content = Vec::new();
    let mut archive = Writer::new(&mut content);
    for name in ["bin", "dev", "proc", "share"] {
        archive.directory(name, 0o755)?;
    }
    archive.character_device("dev/console", 0o600, Device { major: 5, minor: 1 })?;
    archive.file("bin/busybox", 0o755, &fs::read("/bin/busybox")?)?;
    archive.file("init", 0o755, script.as_bytes())?;
    archive.finish()?;
    Ok(fs::write(image, content)?)
}

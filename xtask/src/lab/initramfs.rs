//! The lab's initramfs: busybox, the kernel modules for a root file system over virtio-fs, and the
//! script that mounts the root file system.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, Result, bail};

use super::command::text;
use super::kernel::LabKernel;
use crate::process::{capture, command, shell_word};
use crate::repository;

/// Body of the `/init` script.
const SCRIPT: &str = include_str!("initramfs.sh");

/// Modules for the root file system and for the ports of commands.
const MODULES: [&str; 4] = ["virtio_pci", "virtiofs", "overlay", "virtio_console"];

/// Directories of the lab that are a tmpfs.
const TMPFS: [&str; 7] = [
    "/tmp",
    "/run",
    "/var/tmp",
    "/var/lib/containerd",
    "/var/lib/containers",
    "/var/lib/docker",
    "/var/lib/isopod",
];

/// The `paths` that are hidden by a tmpfs of the lab, or lie on the writable share `work`.
///
/// Paths below another returned path are left out. All `paths` must be absolute and without
/// symbolic links.
pub(super) fn hidden(paths: &[PathBuf], work: &Path) -> Vec<PathBuf> {
    let own = |path: &Path| {
        let mut own = TMPFS.iter().map(Path::new).chain([Path::new("/dev/shm"), work]);
        own.any(|dir| path.starts_with(dir))
    };
    let mut paths: Vec<PathBuf> = paths.iter().filter(|path| own(path)).cloned().collect();
    paths.sort();
    paths.dedup_by(|next, kept| next.starts_with(kept));
    paths
}

/// Writes the uncompressed cpio archive `dir/initramfs.cpio`. Its files are staged in
/// `dir/initramfs`.
///
/// `init` is the program for PID 1. It lies below `work`, the writable share.
pub(super) fn write(dir: &Path, kernel: &LabKernel, init: &Path, work: &Path) -> Result<()> {
    let stage = dir.join("initramfs");
    for name in ["bin", "dev", "proc", "sys", "modules", "lower", "upper", "newroot"] {
        let path = stage.join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
    }
    copy(Path::new("/bin/busybox"), &stage.join("bin/busybox"))?;
    let mut order = String::new();
    for module in kernel.load_order(&MODULES)? {
        let name = module.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let target = stage.join("modules").join(&name);
        copy(&module, &target)?;
        // The insmod of busybox may not know how to decompress a module.
        let plain = match name.strip_suffix(".xz") {
            Some(plain) => {
                capture(command("xz").arg("--decompress").arg(&target))?;
                plain
            }
            None => &name,
        };
        order.push_str(plain);
        order.push('\n');
    }
    write_file(&stage.join("modules/order"), &order)?;

    let mut script = String::from("#!/bin/busybox sh\n");
    for (name, value) in [
        ("LAB_TMPFS", TMPFS.join(" ").as_str()),
        ("LAB_MODULES", text(&kernel.modules)?),
        ("LAB_CHECKOUT", text(repository::root())?),
        ("LAB_WORK", text(work)?),
        ("LAB_INIT", text(init)?),
    ] {
        script.push_str(&format!("export {name}={}\n", shell_word(value)));
    }
    script.push_str(SCRIPT);
    let path = stage.join("init");
    write_file(&path, &script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("cannot make {} executable", path.display()))?;
    archive(&stage, &dir.join("initramfs.cpio"))?;
    fs::remove_dir_all(&stage).with_context(|| format!("cannot remove {}", stage.display()))
}

/// Packs the directory `stage` into the cpio archive `output`.
fn archive(stage: &Path, output: &Path) -> Result<()> {
    let names = capture(command("find").arg(".").current_dir(stage))?;
    let file =
        File::create(output).with_context(|| format!("cannot write {}", output.display()))?;
    let mut cpio = command("cpio")
        .args(["--create", "--format=newc", "--quiet"])
        .current_dir(stage)
        .stdin(Stdio::piped())
        .stdout(file)
        .spawn()
        .context("cannot run cpio")?;
    let mut input = cpio.stdin.take().context("cpio has no standard input")?;
    let fed = input.write_all(names.as_bytes());
    drop(input);
    let status = cpio.wait().context("cannot wait for cpio")?;
    if !status.success() {
        bail!("cpio failed ({status})");
    }
    fed.context("cannot write to cpio")
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to)
        .map(drop)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

fn write_file(path: &Path, content: &str) -> Result<()> {
    fs::write(path, content).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_are_the_uppermost_below_what_is_the_labs() {
        let paths = ["/tmp/b/rootfs", "/srv/b", "/tmp/b", "/w/target/x", "/tmp/bc"];
        let hidden = hidden(&paths.map(PathBuf::from), Path::new("/w/target"));
        assert_eq!(hidden, ["/tmp/b", "/tmp/bc", "/w/target/x"].map(PathBuf::from));
    }
}

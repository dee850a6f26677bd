//! A bundle to try things with: busybox as its root file system, and the configuration that
//! `runc spec` would write.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::process::capture;
use crate::repository;

/// Makes a bundle called `name` whose process is `args`, and returns its directory.
pub(crate) fn make(name: &str, args: &[String]) -> Result<PathBuf> {
    let dir = fresh(name)?;
    let rootfs = dir.join("rootfs");
    for folder in ["bin", "dev", "etc", "proc", "root", "sys", "tmp"] {
        let path = rootfs.join(folder);
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
    }
    let busybox = rootfs.join("bin/busybox");
    fs::copy("/bin/busybox", &busybox)
        .with_context(|| format!("cannot copy /bin/busybox to {}", busybox.display()))?;
    let applets = capture(std::process::Command::new(&busybox).arg("--list"))?;
    for applet in applets.lines().filter(|&applet| applet != "busybox") {
        let link = rootfs.join("bin").join(applet);
        symlink("busybox", &link).with_context(|| format!("cannot link {}", link.display()))?;
    }
    let passwd = "root:x:0:0:root:/root:/bin/sh\n";
    fs::write(rootfs.join("etc/passwd"), passwd).context("cannot write the bundle's passwd")?;
    write_config(&dir, &config(args))?;
    Ok(dir)
}

/// Makes a bundle called `name` that runs `args` as the bundle in `given` would.
pub(crate) fn with_args(name: &str, given: &Path, args: &[String]) -> Result<PathBuf> {
    let path = given.join("config.json");
    let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut config: Value = serde_json::from_slice(&text)
        .with_context(|| format!("{} is not valid JSON", path.display()))?;
    let process = config["process"]
        .as_object_mut()
        .with_context(|| format!("{} has no process", path.display()))?;
    process.insert("args".to_owned(), json!(args));
    let root = config["root"]["path"]
        .as_str()
        .with_context(|| format!("{} has no root.path", path.display()))?;
    let root = fs::canonicalize(given.join(root))
        .with_context(|| format!("the root file system of {} is missing", given.display()))?;
    config["root"]["path"] = json!(root);
    let dir = fresh(name)?;
    write_config(&dir, &config)?;
    Ok(dir)
}

fn fresh(name: &str) -> Result<PathBuf> {
    let dir = repository::target().join("bundle").join(name);
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot remove {}", dir.display()));
        }
        _ => {}
    }
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    Ok(dir)
}

fn write_config(dir: &Path, config: &Value) -> Result<()> {
    let path = dir.join("config.json");
    fs::write(&path, format!("{config:#}\n"))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// The configuration that `runc spec` writes, for `args` and without a terminal.
fn config(args: &[String]) -> Value {
    let capabilities = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    let namespaces = ["pid", "network", "ipc", "uts", "mount", "cgroup"];
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": { "uid": 0, "gid": 0 },
            "args": args,
            "env": [
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "TERM=xterm",
            ],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true,
        },
        "root": { "path": "rootfs", "readonly": true },
        "hostname": "isopod",
        "mounts": mounts(),
        "linux": {
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "namespaces": namespaces.map(|kind| json!({ "type": kind })),
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware",
                "/proc/scsi",
            ],
            "readonlyPaths": [
                "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger",
            ],
        },
    })
}

fn mounts() -> Value {
    json!([
        mount("/proc", "proc", "proc", &[]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount(
            "/dev/shm",
            "tmpfs",
            "shm",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]
        ),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", "ro"]
        ),
    ])
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    let mut mount = json!({ "destination": destination, "type": kind, "source": source });
    if !options.is_empty() {
        mount["options"] = json!(options);
    }
    mount
}

//! Bundles: those made here, with busybox and the configuration of `runc spec`, and those of users.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::process::capture;
use crate::repository;

/// Makes a bundle called `name` with the process `args`. Returns its directory.
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

/// A bundle of the user.
#[derive(Debug)]
pub(crate) struct Given {
    dir: PathBuf,
    config: Value,
}

impl Given {
    /// Reads the bundle in `dir`, an absolute path without symbolic links.
    pub(crate) fn read(dir: PathBuf) -> Result<Self> {
        let path = dir.join("config.json");
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let config = serde_json::from_slice(&text)
            .with_context(|| format!("{} is not valid JSON", path.display()))?;
        Ok(Self { dir, config })
    }

    /// Existing paths of the bundle: its directory, its root file system and its bind sources.
    pub(crate) fn paths(&self) -> Vec<PathBuf> {
        let mounts = self.config["mounts"].as_array().map(Vec::as_slice).unwrap_or_default();
        let binds = mounts.iter().filter(|mount| is_bind(mount)).map(|mount| &mount["source"]);
        let sources = [&self.config["root"]["path"]].into_iter().chain(binds);
        let found = sources
            .filter_map(Value::as_str)
            .filter_map(|source| fs::canonicalize(self.dir.join(source)).ok());
        [self.dir.clone()].into_iter().chain(found).collect()
    }

    /// Writes a copy of `config.json` with `terminal` false to another directory. Returns its path.
    ///
    /// Returns none if the bundle asks for no terminal.
    pub(crate) fn without_terminal(mut self) -> Result<Option<PathBuf>> {
        let terminal = &mut self.config["process"]["terminal"];
        if *terminal != true {
            return Ok(None);
        }
        *terminal = json!(false);
        let dir = fresh("given")?;
        write_config(&dir, &self.config)?;
        Ok(Some(dir.join("config.json")))
    }
}

fn is_bind(mount: &Value) -> bool {
    let options = mount["options"].as_array().map(Vec::as_slice).unwrap_or_default();
    mount["type"] == "bind" || options.iter().any(|option| option == "bind" || option == "rbind")
}

/// Makes an empty directory for the bundle `name`.
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

/// The configuration of `runc spec`, with the process `args` and without a terminal.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_given_bundle_is_made_up_of_its_root_and_binds() {
        let here = fs::canonicalize(env!("CARGO_MANIFEST_DIR")).unwrap();
        let bind = json!({ "type": "none", "source": "../shim", "options": ["rbind", "ro"] });
        let mounts = [mount("/proc", "proc", "src", &[]), bind];
        let config = json!({ "root": { "path": "src" }, "mounts": mounts });
        let given = Given { dir: here.clone(), config };
        let shim = here.parent().unwrap().join("shim");
        assert_eq!(given.paths(), [here.clone(), here.join("src"), shim]);
        assert_eq!(given.without_terminal().unwrap(), None);
    }
}

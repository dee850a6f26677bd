//! A bundle: a busybox root file system and a config.json like that of `runc spec`.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::runtime::runtime;

/// The path of the probe in a bundle's root file system.
pub const PROBE_PATH: &str = "/bin/probe";

/// A bundle on disk, and the configuration that [`Bundle::write`] puts there.
#[derive(Debug)]
pub struct Bundle {
    /// The bundle's directory.
    pub dir: PathBuf,
    /// The content of config.json.
    pub config: Value,
}

impl Bundle {
    /// Makes a bundle in the new directory `dir`.
    pub fn new(dir: PathBuf) -> Self {
        let rootfs = dir.join("rootfs");
        for name in ["bin", "dev", "etc", "home", "proc", "root", "sys", "tmp"] {
            fs::create_dir_all(rootfs.join(name)).expect("cannot make the root file system");
        }
        mode(&rootfs.join("tmp"), 0o1777);
        copy(Path::new("/bin/busybox"), &rootfs.join("bin/busybox"));
        copy(&runtime().probe, &rootfs.join("bin/probe"));
        for applet in applets() {
            symlink("busybox", rootfs.join("bin").join(applet)).expect("cannot link an applet");
        }
        let users = "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000::/home:/bin/sh\n";
        fs::write(rootfs.join("etc/passwd"), users).expect("/etc/passwd");
        fs::write(rootfs.join("etc/group"), "root:x:0:\nalice:x:1000:\n").expect("/etc/group");
        Self { dir, config: runc_spec() }
    }

    /// The path on the host of `path` in the root file system. `path` begins with a slash.
    pub fn rootfs(&self, path: &str) -> PathBuf {
        self.dir.join("rootfs").join(path.trim_start_matches('/'))
    }

    /// Writes config.json.
    pub fn write(&self) {
        let json = serde_json::to_vec_pretty(&self.config).expect("JSON");
        fs::write(self.dir.join("config.json"), json).expect("cannot write config.json");
    }
}

fn copy(from: &Path, to: &Path) {
    fs::copy(from, to)
        .unwrap_or_else(|e| panic!("cannot copy {} to {}: {e}", from.display(), to.display()));
    mode(to, 0o755);
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
}

fn applets() -> &'static [String] {
    static APPLETS: OnceLock<Vec<String>> = OnceLock::new();
    APPLETS.get_or_init(|| {
        let out = std::process::Command::new("/bin/busybox")
            .arg("--list")
            .output()
            .expect("cannot run /bin/busybox; install the package busybox-static");
        let text = String::from_utf8(out.stdout).expect("names");
        text.lines().filter(|&l| l != "busybox").map(str::to_owned).collect()
    })
}

/// The output of `runc spec`, without a terminal and with a writable root.
fn runc_spec() -> Value {
    let capabilities = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": { "uid": 0, "gid": 0 },
            "args": ["true"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities,
                "effective": capabilities,
                "permitted": capabilities,
                "ambient": capabilities,
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true,
        },
        "root": { "path": "rootfs", "readonly": false },
        "hostname": "isopod",
        "mounts": [
            mount("/proc", "proc", "proc", &[]),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", "devpts",
                &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", "shm",
                &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", "cgroup",
                &["nosuid", "noexec", "nodev", "relatime", "ro"]),
        ],
        "linux": {
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "namespaces": [
                { "type": "pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" },
                { "type": "mount" }, { "type": "cgroup" },
            ],
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

/// An entry of `mounts`.
pub(crate) fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    json!({ "destination": destination, "type": kind, "source": source, "options": options })
}

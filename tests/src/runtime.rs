//! The binaries under test.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The OCI runtime under test.
#[derive(Debug)]
pub struct Runtime {
    /// The path of its program.
    pub path: PathBuf,
    /// The path of the probe program.
    pub probe: PathBuf,
}

impl Runtime {
    /// Returns true for Isopod, false for a runtime that proves the tests.
    pub fn is_isopod(&self) -> bool {
        self.path.file_name().is_some_and(|n| n == "isopod")
    }

    /// A file beside the runtime, such as the guest kernel.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.path.parent().unwrap_or(Path::new("/")).join(name)
    }
}

/// The OCI runtime under test, from the environment.
pub fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        assert!(nix::unistd::geteuid().is_root(), "the end-to-end tests have to run as root");
        let path = variable("ISOPOD_TEST_RUNTIME", "isopod");
        let probe = variable("ISOPOD_PROBE", "isopod-probe");
        Runtime { path, probe }
    })
}

fn variable(name: &str, in_bin_dir: &str) -> PathBuf {
    let path = std::env::var_os(name).map(PathBuf::from).unwrap_or_else(|| {
        let Some(dir) = std::env::var_os("ISOPOD_BIN_DIR") else {
            panic!(
                "ISOPOD_BIN_DIR does not name the directory with the built binaries; \
                 run these tests by `cargo xtask test`"
            );
        };
        Path::new(&dir).join(in_bin_dir)
    });
    std::path::absolute(&path)
        .ok()
        .filter(|p| p.is_file())
        .unwrap_or_else(|| panic!("{} is missing; run `cargo xtask test`", path.display()))
}

/// Memory of this machine in MiB.
pub fn host_memory_mib() -> u64 {
    meminfo_kib("MemTotal") / 1024
}

/// A figure of `/proc/meminfo` in KiB.
pub fn meminfo_kib(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").expect("/proc/meminfo");
    let line = text.lines().find(|l| l.starts_with(&format!("{name}:")));
    let figure = line.and_then(|l| l.split_whitespace().nth(1)).and_then(|n| n.parse().ok());
    figure.unwrap_or_else(|| panic!("/proc/meminfo has no {name}"))
}

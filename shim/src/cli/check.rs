//! `check`: what this host has and lacks.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use super::{list::columns, print};
use crate::{
    error::Result,
    host::{self, Kvm},
    settings::Artifacts,
};

/// The least kernel release with everything that is used: `mount_setattr(2)` came last.
const LEAST_KERNEL: (u32, u32) = (5, 12);

/// One line of the table.
struct Finding {
    what: &'static str,
    /// Whether a sandbox can run with it; `None` if it can either way.
    good: Option<bool>,
    found: String,
}

/// Prints the table. 0 if a sandbox can run on this host, else 1.
///
/// # Errors
///
/// If it cannot be printed.
pub(super) fn run() -> Result<u8> {
    let findings = findings();
    let rows: Vec<[String; 3]> = findings
        .iter()
        .map(|finding| {
            let mark = match finding.good {
                Some(true) => "ok",
                Some(false) => "MISSING",
                None => "-",
            };
            [finding.what.to_owned(), mark.to_owned(), finding.found.clone()]
        })
        .collect();
    let able = findings.iter().all(|finding| finding.good != Some(false));
    print(&columns(&rows))?;
    print(if able { "a sandbox can run here\n" } else { "a sandbox cannot run here\n" })?;
    Ok(u8::from(!able))
}

fn findings() -> Vec<Finding> {
    let [vmm, kernel, initramfs] = Artifacts::find_each();
    vec![
        kvm(),
        host_kernel(),
        permission(),
        artifact("vmm", vmm, true),
        artifact("guest kernel", kernel, false),
        artifact("guest image", initramfs, false),
        Finding { what: "vsock", good: None, found: "not needed: the VMM has its own".into() },
        tun(),
        Finding { what: "cgroups", good: None, found: cgroups().into() },
        Finding {
            what: "size",
            good: None,
            found: format!("{} CPUs, {} MiB of memory", host::online_cpus(), host::memory_mib()),
        },
    ]
}

fn kvm() -> Finding {
    let finding = |good, found| Finding { what: "kvm", good: Some(good), found };
    match host::open_kvm() {
        Err(error) => finding(false, error.message),
        Ok(_) => match host::kvm_kind(Path::new("/proc/cpuinfo"), Path::new("/sys/module")) {
            Ok(Kvm::Hardware { module }) => finding(true, format!("hardware, {module}")),
            Ok(Kvm::Software { .. }) => finding(false, "software".into()),
            Err(error) => finding(false, error.message),
        },
    }
}

fn host_kernel() -> Finding {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let (major, minor) = LEAST_KERNEL;
    let good = version >= LEAST_KERNEL;
    let needed = if good { String::new() } else { format!(" (needs {major}.{minor} or newer)") };
    Finding { what: "host kernel", good: Some(good), found: format!("Linux {release}{needed}") }
}

fn permission() -> Finding {
    let root = rustix::process::geteuid().is_root();
    let found = if root { "root" } else { "not root: mount namespaces cannot be made" };
    Finding { what: "user", good: Some(root), found: found.into() }
}

fn artifact(what: &'static str, path: Result<PathBuf>, program: bool) -> Finding {
    let found = path.and_then(|path| {
        use crate::error::Explain;
        let size = fs::metadata(&path).explain(|| format!("cannot read {}", path.display()))?.len();
        let version = if program { version(&path)? } else { String::new() };
        Ok(format!("{}, {} KiB{version}", path.display(), size.div_ceil(1024)))
    });
    match found {
        Ok(found) => Finding { what, good: Some(true), found },
        Err(error) => Finding { what, good: Some(false), found: error.message },
    }
}

/// What a program answers to `--version`, on one line.
fn version(program: &Path) -> Result<String> {
    use crate::error::{Error, Explain};
    let what = || format!("cannot run {}", program.display());
    let output = Command::new(program).arg("--version").output().explain(what)?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().next() {
        Some(line) if output.status.success() => Ok(format!(", {line}")),
        _ => Err(Error::new(format!("{}: it does not tell its version", what()))),
    }
}

fn tun() -> Finding {
    let found = if Path::new("/dev/net/tun").exists() {
        "/dev/net/tun (not used yet)"
    } else {
        "no /dev/net/tun (not needed yet)"
    };
    Finding { what: "tun", good: None, found: found.into() }
}

fn cgroups() -> &'static str {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        "version 2 (not used on the host yet)"
    } else if Path::new("/sys/fs/cgroup").exists() {
        "version 1 or hybrid (not used on the host yet)"
    } else {
        "none (not used on the host yet)"
    }
}

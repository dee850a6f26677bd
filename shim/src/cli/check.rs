//! `check`: prints a table of the host features that a sandbox needs or uses.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use rustix::process::{Resource, getrlimit};

use crate::{
    bundle::check_allowed_list,
    cli::{exposure, list::columns, print},
    error::Result,
    host::{self, Kvm},
    network::{self, Trial},
    settings::{self, Artifacts},
};

/// The oldest kernel release with every feature in use: `mount_setattr(2)` came last.
const LEAST_KERNEL: (u32, u32) = (5, 12);

/// Fewest open files that a sandbox process or a VMM can work with.
const LEAST_DESCRIPTORS: u64 = 256;

/// Open files that are enough for a guest with many open files.
const GOOD_DESCRIPTORS: u64 = 65_536;

/// Cgroup controllers behind the limits and figures of a sandbox's cgroup.
const CONTROLLERS: [&str; 4] = ["cpu", "io", "memory", "pids"];

/// One line of the table.
struct Finding {
    what: &'static str,
    mark: Mark,
    found: String,
}

/// Second column of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    /// There, needed or not.
    Ok,
    /// Needed by every sandbox, and not there.
    Missing,
    /// Optional and not there, or not tried, or information only.
    Note,
}

impl Mark {
    /// Mark of something that every sandbox needs.
    fn needed(there: bool) -> Self {
        if there { Self::Ok } else { Self::Missing }
    }

    /// Mark of something that a sandbox can do without.
    fn optional(there: bool) -> Self {
        if there { Self::Ok } else { Self::Note }
    }

    fn text(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Missing => "MISSING",
            Self::Note => "-",
        }
    }
}

/// Prints the table. Returns 0 if a sandbox can run on this host, else 1.
pub(super) fn run() -> Result<u8> {
    let findings = findings();
    let rows: Vec<[String; 3]> = findings
        .iter()
        .map(|finding| {
            [finding.what.to_owned(), finding.mark.text().to_owned(), finding.found.clone()]
        })
        .collect();
    let able = findings.iter().all(|finding| finding.mark != Mark::Missing);
    print(&columns(&rows))?;
    print(if able { "a sandbox can run here\n" } else { "a sandbox cannot run here\n" })?;
    Ok(u8::from(!able))
}

fn findings() -> Vec<Finding> {
    let [vmm, kernel, initramfs] = Artifacts::find_each();
    let mut findings = vec![
        kvm(),
        host_kernel(),
        permission(),
        artifact("vmm", vmm, true),
        artifact("guest kernel", kernel, false),
        artifact("guest image", initramfs, false),
        Finding {
            what: "vsock",
            mark: Mark::Note,
            found: "not needed: the VMM has its own".into(),
        },
        settings(),
        vhost_net(),
        cgroups(Path::new("/sys/fs/cgroup")),
        descriptors(),
        Finding {
            what: "size",
            mark: Mark::Note,
            found: format!("{} CPUs, {} MiB of memory", host::online_cpus(), host::memory_mib()),
        },
    ];
    findings.extend(network());
    findings.extend(exposure());
    findings
}

fn kvm() -> Finding {
    let finding = |good, found| Finding { what: "kvm", mark: Mark::needed(good), found };
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
    Finding {
        what: "host kernel",
        mark: Mark::needed(good),
        found: format!("Linux {release}{needed}"),
    }
}

/// Tells whether the settings of the operator can be used. Files are rows of their own.
fn settings() -> Finding {
    let checked = settings::nics()
        .and(settings::disks())
        .and(settings::host_sockets())
        .and(settings::boot_timeout())
        .and(settings::kernel_params())
        .and_then(|_| check_allowed_list(settings::allowed_annotations()?));
    let mark = Mark::needed(checked.is_ok());
    let found = checked.map_or_else(|error| error.message, |()| "can be used".to_owned());
    Finding { what: "settings", mark, found }
}

fn permission() -> Finding {
    let root = rustix::process::geteuid().is_root();
    let found = if root { "root" } else { "not root: mount namespaces cannot be made" };
    Finding { what: "user", mark: Mark::needed(root), found: found.into() }
}

fn artifact(what: &'static str, path: Result<PathBuf>, program: bool) -> Finding {
    let found = path.and_then(|path| {
        use crate::error::Explain;
        let size = fs::metadata(&path).explain(|| format!("cannot read {}", path.display()))?.len();
        let version = if program { version(&path)? } else { String::new() };
        Ok(format!("{}, {} KiB{version}", path.display(), size.div_ceil(1024)))
    });
    let mark = Mark::needed(found.is_ok());
    Finding { what, mark, found: found.unwrap_or_else(|error| error.message) }
}

/// Returns the first line that a program prints for `--version`, after a comma.
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

/// Tries taps and redirects in a network namespace that ends with the trial.
fn network() -> [Finding; 3] {
    let finding = |what, mark: fn(bool) -> Mark, tried: Option<Result<()>>, found: &str| match tried
    {
        None => Finding { what, mark: Mark::Note, found: "not tried".into() },
        Some(Ok(())) => Finding { what, mark: mark(true), found: found.into() },
        Some(Err(error)) => Finding { what, mark: mark(false), found: error.message },
    };
    let Trial { taps, redirects, names } = network::try_out();
    let modules = "sch_ingress, cls_matchall, act_mirred";
    let for_names = "cls_u32, for networks of Docker's users";
    [
        finding("tun", Mark::needed, Some(taps), "/dev/net/tun"),
        finding("traffic control", Mark::needed, redirects, modules),
        finding("name service", Mark::optional, names, for_names),
    ]
}

fn vhost_net() -> Finding {
    let opened = fs::File::options().read(true).write(true).open(network::VHOST_NET);
    let mark = Mark::optional(opened.is_ok());
    let found = match opened {
        Ok(_) => network::VHOST_NET.to_owned(),
        Err(error) => format!(
            "cannot open {}, so the VMM moves the packets, which takes more time (`modprobe vhost_net` \
             may load it): {error}",
            network::VHOST_NET
        ),
    };
    Finding { what: "vhost-net", mark, found }
}

/// Looks for cgroups v2 at their mount point on the host. A sandbox runs without them too, but then
/// nothing limits it on the host.
fn cgroups(mount: &Path) -> Finding {
    let (there, found) = match fs::read_to_string(mount.join("cgroup.controllers")) {
        Ok(controllers) => {
            let lacks = |name: &&&str| !controllers.split_whitespace().any(|one| one == **name);
            let missing: Vec<&str> = CONTROLLERS.iter().filter(lacks).copied().collect();
            match missing[..] {
                [] => (true, "version 2".to_owned()),
                _ => (false, format!("version 2, without the controllers {}", missing.join(", "))),
            }
        }
        Err(_) => {
            let found = "not version 2: sandboxes stay in the cgroup of their caller, and limits \
                         hold in their microVMs only";
            (false, found.to_owned())
        }
    };
    Finding { what: "cgroups", mark: Mark::optional(there), found }
}

fn descriptors() -> Finding {
    let limit = getrlimit(Resource::Nofile);
    let (soft, hard) = (limit.current.unwrap_or(u64::MAX), limit.maximum.unwrap_or(u64::MAX));
    let note = match hard {
        ..LEAST_DESCRIPTORS => format!(" (needs {LEAST_DESCRIPTORS})"),
        LEAST_DESCRIPTORS..GOOD_DESCRIPTORS => {
            format!(": files that guests have open are bounded by it (better {GOOD_DESCRIPTORS})")
        }
        _ => String::new(),
    };
    let found = format!("at most {hard}, {soft} at first{note}");
    Finding { what: "descriptors", mark: Mark::needed(hard >= LEAST_DESCRIPTORS), found }
}

fn exposure() -> [Finding; 3] {
    let cpu = Path::new("/sys/devices/system/cpu");
    [
        ("SMT", exposure::smt(&cpu.join("smt"))),
        ("KSM", exposure::ksm(Path::new("/sys/kernel/mm/ksm"))),
        ("mitigations", exposure::mitigations(&cpu.join("vulnerabilities"))),
    ]
    .map(|(what, found)| Finding { what, mark: Mark::Note, found })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_optional_feature_is_ok_only_if_it_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let mark = || cgroups(dir.path()).mark;
        assert_eq!(mark(), Mark::Note);
        for (controllers, expected) in
            [("cpu memory\n", Mark::Note), ("cpuset cpu io memory pids\n", Mark::Ok)]
        {
            fs::write(dir.path().join("cgroup.controllers"), controllers).unwrap();
            assert_eq!(mark(), expected, "{controllers}");
        }
    }
}

//! Abilities of this host: KVM, processors and memory.

use std::{
    fs::{self, File, OpenOptions},
    io,
    path::Path,
};

use crate::error::{Error, Explain, Result};

/// The kind of KVM behind `/dev/kvm`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kvm {
    /// Hardware virtualisation of the processor, by the named kernel module.
    Hardware {
        /// `kvm_amd` or `kvm_intel`.
        module: String,
    },
    /// A KVM that emulates. It cannot boot a stock kernel in useful time.
    Software {
        /// The module behind it, if it shows in `/sys/module`.
        module: Option<String>,
    },
}

/// Opens `/dev/kvm`, and refuses a KVM that cannot boot Linux. The error says what is missing: the
/// device, the permission or the hardware.
pub fn open_kvm() -> Result<File> {
    let file =
        OpenOptions::new().read(true).write(true).open("/dev/kvm").map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => Error::new(
                "this host has no /dev/kvm: load kvm_amd or kvm_intel, and enable virtualisation \
                 in the firmware (or nested virtualisation on the outer host)",
            ),
            io::ErrorKind::PermissionDenied => Error::new(
                "no permission to use /dev/kvm: run as root, or as a member of the group that owns \
                 it",
            ),
            _ => Error::because("cannot open /dev/kvm", e),
        })?;
    match kvm_kind(Path::new("/proc/cpuinfo"), Path::new("/sys/module"))? {
        Kvm::Hardware { module } => {
            log::debug!("/dev/kvm is {module}");
            Ok(file)
        }
        Kvm::Software { module } => Err(Error::new(format!(
            "/dev/kvm{} is a software KVM, which cannot boot a guest kernel (the processor shows \
             neither svm nor vmx): use a host with hardware virtualisation, or the lab \
             (`cargo xtask demo`)",
            module.map(|m| format!(" ({m})")).unwrap_or_default()
        ))),
    }
}

/// Tells a hardware KVM from a software KVM by the processor's flags and the loaded module.
pub fn kvm_kind(cpuinfo: &Path, modules: &Path) -> Result<Kvm> {
    let text =
        fs::read_to_string(cpuinfo).explain(|| format!("cannot read {}", cpuinfo.display()))?;
    let flags = text
        .lines()
        .find(|line| line.starts_with("flags"))
        .and_then(|line| line.split_once(':'))
        .map_or("", |(_, flags)| flags);
    let has = |flag: &str| flags.split_ascii_whitespace().any(|f| f == flag);
    for (flag, module) in [("svm", "kvm_amd"), ("vmx", "kvm_intel")] {
        if has(flag) && modules.join(module).is_dir() {
            return Ok(Kvm::Hardware { module: module.to_owned() });
        }
    }
    let module = fs::read_dir(modules)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .find(|name| name.starts_with("kvm_"));
    Ok(Kvm::Software { module })
}

/// Number of processors that are online.
pub fn online_cpus() -> u64 {
    std::fs::read_to_string("/sys/devices/system/cpu/online")
        .ok()
        .and_then(|list| crate::cpu_list::cpu_list_len(list.trim()))
        .or_else(|| std::thread::available_parallelism().ok().map(|n| n.get() as u64))
        .unwrap_or(1)
}

/// Memory of this host in MiB.
pub fn memory_mib() -> u64 {
    let info = rustix::system::sysinfo();
    #[allow(clippy::unnecessary_cast, reason = "the width differs between targets")]
    let bytes = (info.totalram as u64).saturating_mul(u64::from(info.mem_unit).max(1));
    bytes >> 20
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(flags: &str, modules: &[&str]) -> Kvm {
        let dir = tempfile::tempdir().unwrap();
        let cpuinfo = dir.path().join("cpuinfo");
        fs::write(&cpuinfo, format!("processor\t: 0\nflags\t\t: fpu {flags} sse\n")).unwrap();
        for module in modules {
            fs::create_dir_all(dir.path().join("module").join(module)).unwrap();
        }
        kvm_kind(&cpuinfo, &dir.path().join("module")).unwrap()
    }

    #[test]
    fn hardware_needs_the_flag_and_its_module() {
        assert_eq!(kind("svm", &["kvm", "kvm_amd"]), Kvm::Hardware { module: "kvm_amd".into() });
        assert_eq!(kind("vmx", &["kvm_intel"]), Kvm::Hardware { module: "kvm_intel".into() });
        assert_eq!(
            kind("lm", &["kvm", "kvm_pvm"]),
            Kvm::Software { module: Some("kvm_pvm".into()) }
        );
        assert_eq!(kind("svm", &["kvm"]), Kvm::Software { module: None });
        assert_eq!(kind("lm", &[]), Kvm::Software { module: None });
    }

    #[test]
    fn this_host_has_processors_and_memory() {
        assert!(online_cpus() >= 1);
        assert!(memory_mib() > 100);
    }
}

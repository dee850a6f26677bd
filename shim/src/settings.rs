//! Settings of this host's operator: the files of a microVM, and more.
//!
//! The files are searched for in this order:
//!
//! - the environment (`ISOPOD_VMM`, `ISOPOD_KERNEL`, `ISOPOD_INITRAMFS`)
//! - the keys `vmm`, `kernel` and `initramfs` of `/etc/isopod/config.toml`
//! - the directory of the running `isopod`
//! - the directories of an installation: `libexec/isopod` and `share/isopod` next to the `bin` or
//!   `sbin` that `isopod` is in

use std::{
    env, fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::OnceLock,
    time::Duration,
};

use isopod_vmm::config::MAX_NET_DEVICES;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Explain, Result};

/// The file with the operator's settings.
pub const CONFIG_FILE: &str = "/etc/isopod/config.toml";

/// Time limit for a guest, from the VMM's start to its agent's hello. `ISOPOD_BOOT_TIMEOUT` (in
/// seconds) sets another.
pub const BOOT_TIMEOUT: Duration = Duration::from_secs(30);

/// Number of spare network devices of a microVM, unless the settings or the container have another:
/// one network, and one more.
const SPARE_NICS: u8 = 2;

/// The three files of a microVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifacts {
    /// The `isopod-vmm` program.
    pub vmm: PathBuf,
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The guest image.
    pub initramfs: PathBuf,
}

/// Keys of [`CONFIG_FILE`].
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigFile {
    vmm: Option<PathBuf>,
    kernel: Option<PathBuf>,
    initramfs: Option<PathBuf>,
    kernel_params: Option<String>,
    share_kernel: Option<bool>,
    nics: Option<u8>,
}

/// A search for one of the files.
struct Search {
    what: &'static str,
    variable: &'static str,
    key: &'static str,
    file: &'static str,
    installed: &'static str,
}

const VMM: Search = Search {
    what: "the virtual machine monitor",
    variable: "ISOPOD_VMM",
    key: "vmm",
    file: "isopod-vmm",
    installed: "libexec/isopod",
};
const KERNEL: Search = Search {
    what: "the guest kernel",
    variable: "ISOPOD_KERNEL",
    key: "kernel",
    file: "vmlinux",
    installed: "share/isopod",
};
const INITRAMFS: Search = Search {
    what: "the guest image",
    variable: "ISOPOD_INITRAMFS",
    key: "initramfs",
    file: "isopod.initramfs",
    installed: "share/isopod",
};

impl Artifacts {
    /// Finds all three files.
    pub fn find() -> Result<Self> {
        let [vmm, kernel, initramfs] = Self::find_each();
        Ok(Self { vmm: vmm?, kernel: kernel?, initramfs: initramfs? })
    }

    /// Finds each file by itself: VMM, kernel, image.
    pub fn find_each() -> [Result<PathBuf>; 3] {
        let config = match ConfigFile::of_host() {
            Ok(config) => config,
            Err(e) => return [Err(e.clone()), Err(e.clone()), Err(e)],
        };
        [
            VMM.find(config.vmm.as_deref()),
            KERNEL.find(config.kernel.as_deref()),
            INITRAMFS.find(config.initramfs.as_deref()),
        ]
    }
}

impl ConfigFile {
    /// The settings file of this host, read once.
    fn of_host() -> Result<&'static Self> {
        static FILE: OnceLock<Result<ConfigFile>> = OnceLock::new();
        FILE.get_or_init(|| Self::read(Path::new(CONFIG_FILE))).as_ref().map_err(Error::clone)
    }

    fn read(path: &Path) -> Result<Self> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Self::default()),
            Err(e) => return Err(e).explain(|| format!("cannot read {}", path.display())),
        };
        toml::from_str(&text).map_err(|e| {
            let reason = e.message().lines().collect::<Vec<_>>().join(" ");
            let start = e.span().map_or(0, |span| span.start);
            let line = text.bytes().take(start).filter(|byte| *byte == b'\n').count() + 1;
            Error::new(format!("{}, line {line}: {reason}", path.display()))
        })
    }
}

impl Search {
    fn find(&self, configured: Option<&Path>) -> Result<PathBuf> {
        if let Some(path) = env::var_os(self.variable).filter(|v| !v.is_empty()) {
            return self.accept(PathBuf::from(path), &format!("${}", self.variable));
        }
        if let Some(path) = configured {
            return self.accept(path.to_owned(), &format!("{:?} in {CONFIG_FILE}", self.key));
        }
        let program = env::current_exe().explain(|| "cannot read /proc/self/exe".into())?;
        let [beside, installed] = self.places(&program);
        for path in [&beside, &installed] {
            if path.is_file() {
                return Ok(path.clone());
            }
        }
        Err(Error::new(format!(
            "{} is missing: neither {} nor {} exists; build it with `cargo xtask build`, or set {}",
            self.what,
            beside.display(),
            installed.display(),
            self.variable
        )))
    }

    /// Places of the file if no setting names one: beside `program`, and in its installation.
    fn places(&self, program: &Path) -> [PathBuf; 2] {
        let dir = program.parent().unwrap_or(Path::new("/"));
        let prefix = dir.parent().unwrap_or(Path::new("/"));
        [dir.join(self.file), prefix.join(self.installed).join(self.file)]
    }

    fn accept(&self, path: PathBuf, origin: &str) -> Result<PathBuf> {
        let path = std::path::absolute(&path)
            .explain(|| format!("cannot make {} absolute", path.display()))?;
        let metadata = fs::metadata(&path)
            .explain(|| format!("{} is missing: {} (from {origin})", self.what, path.display()))?;
        if metadata.is_file() {
            return Ok(path);
        }
        Err(Error::new(format!(
            "{} {} (from {origin}) is not a regular file",
            self.what,
            path.display()
        )))
    }
}

/// Parameters for the end of the guest kernel's command line: `ISOPOD_KERNEL_PARAMS`, or the key
/// `kernel_params` of `/etc/isopod/config.toml`. Empty without both.
pub fn kernel_params() -> Result<String> {
    match env::var("ISOPOD_KERNEL_PARAMS") {
        Ok(params) => Ok(params),
        Err(env::VarError::NotPresent) => {
            Ok(ConfigFile::of_host()?.kernel_params.clone().unwrap_or_default())
        }
        Err(env::VarError::NotUnicode(_)) => {
            Err(Error::new("ISOPOD_KERNEL_PARAMS is not valid UTF-8"))
        }
    }
}

/// Tells whether microVMs share the pages of the guest kernel that it does not change. This is the
/// key `share_kernel` of `/etc/isopod/config.toml`, by default false.
pub fn share_kernel() -> Result<bool> {
    Ok(ConfigFile::of_host()?.share_kernel.unwrap_or_default())
}

/// Number of network devices for a microVM whose namespace is empty when the container is created.
/// This is the key `nics` of `/etc/isopod/config.toml`, by default [`SPARE_NICS`].
pub fn nics() -> Result<u8> {
    match ConfigFile::of_host()?.nics {
        None => Ok(SPARE_NICS),
        Some(nics @ 0..=MAX_NET_DEVICES) => Ok(nics),
        Some(nics) => Err(Error::new(format!(
            "nics in {CONFIG_FILE} is {nics}; it has to be from 0 to {MAX_NET_DEVICES}"
        ))),
    }
}

/// Time limit for a guest's boot: `ISOPOD_BOOT_TIMEOUT`, a whole number of seconds from 1 to 3600,
/// or [`BOOT_TIMEOUT`].
pub fn boot_timeout() -> Result<Duration> {
    let Some(text) = env::var_os("ISOPOD_BOOT_TIMEOUT") else { return Ok(BOOT_TIMEOUT) };
    text.to_str()
        .and_then(|t| t.parse::<u64>().ok())
        .filter(|seconds| (1..=3600).contains(seconds))
        .map(Duration::from_secs)
        .ok_or_else(|| {
            Error::new(format!(
                "ISOPOD_BOOT_TIMEOUT is {text:?}; it has to be a whole number of seconds from 1 to \
                 3600"
            ))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_settings_file_names_the_line_of_a_mistake() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        fs::write(&path, "vmm = \"/x\"\nkernal = \"/y\"\n").unwrap();
        let error = ConfigFile::read(&path).unwrap_err();
        assert!(error.message.contains("line 2"), "{error}");
        assert!(error.message.contains("kernal"), "{error}");
        assert!(!error.message.contains('\n'), "{error}");
        fs::write(&path, "vmm = \"/x\"\n").unwrap();
        assert_eq!(ConfigFile::read(&path).unwrap().vmm, Some("/x".into()));
        fs::write(&path, "kernel_params = \"nohz=off\"\nshare_kernel = true\n").unwrap();
        let config = ConfigFile::read(&path).unwrap();
        assert_eq!(config.kernel_params.unwrap(), "nohz=off");
        assert_eq!(config.share_kernel, Some(true));
        assert!(ConfigFile::read(&dir.path().join("none")).unwrap().vmm.is_none());
    }

    #[test]
    fn an_installation_may_be_anywhere() {
        assert_eq!(
            VMM.places(Path::new("/opt/x/bin/isopod")),
            [
                PathBuf::from("/opt/x/bin/isopod-vmm"),
                PathBuf::from("/opt/x/libexec/isopod/isopod-vmm")
            ]
        );
    }

    #[test]
    fn a_configured_file_has_to_exist() {
        let dir = tempfile::tempdir().unwrap();
        let error = KERNEL.accept(dir.path().join("vmlinux"), "$ISOPOD_KERNEL").unwrap_err();
        assert!(error.message.starts_with("the guest kernel is missing: "), "{error}");
        assert!(error.message.ends_with("no such file or directory"), "{error}");
        let error = KERNEL.accept(dir.path().to_owned(), "$ISOPOD_KERNEL").unwrap_err();
        assert!(error.message.contains("not a regular file"), "{error}");
    }
}

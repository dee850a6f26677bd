//! Settings of this host's operator: the files of a microVM, and more.
//!
//! The files are searched for in this order:
//!
//! - the environment (`ISOPOD_VMM`, `ISOPOD_KERNEL`, `ISOPOD_INITRAMFS`)
//! - the keys `vmm`, `kernel` and `initramfs` of `/etc/isopod/config.toml`
//! - the directory of the running `isopod`
//! - the directories of an installation: `libexec/isopod` and `share/isopod` next to the `bin` or
//!   `sbin` that `isopod` is in

mod default_text;

use std::{
    env, fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::OnceLock,
    time::Duration,
};

use isopod_vmm::config::{MAX_CMDLINE_LEN, MAX_DISK_SLOTS, MAX_NET_DEVICES};
use serde::{Deserialize, Serialize};

pub use self::default_text::default_text;
use crate::{
    error::{Error, Explain, Result},
    toml_text::parse,
};

/// The file with the operator's settings.
pub const CONFIG_FILE: &str = "/etc/isopod/config.toml";

/// Time limit for a guest, from the VMM's start to its agent's hello. `ISOPOD_BOOT_TIMEOUT` (in
/// seconds) sets another.
pub const BOOT_TIMEOUT: Duration = Duration::from_secs(30);

/// Number of spare network devices of a microVM, unless the settings or the container have another:
/// one network, and one more.
const SPARE_NICS: u8 = 2;

/// Number of places for disks in the microVM of a pod, unless the settings have another.
const SPARE_DISKS: u8 = 4;

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

/// Largest length of `kernel_params`, in bytes: the VMM takes no more.
const MAX_KERNEL_PARAMS: usize = MAX_CMDLINE_LEN / 2;

/// Keys of [`CONFIG_FILE`]. Each has its text in `settings/default_text.rs`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ConfigFile {
    /// Empty for the search, as for the next two.
    vmm: PathBuf,
    kernel: PathBuf,
    initramfs: PathBuf,
    kernel_params: String,
    share_kernel: bool,
    nics: u8,
    disks: u8,
    host_sockets: Vec<PathBuf>,
    allowed_annotations: Vec<String>,
}

impl Default for ConfigFile {
    fn default() -> Self {
        Self {
            vmm: PathBuf::new(),
            kernel: PathBuf::new(),
            initramfs: PathBuf::new(),
            kernel_params: String::new(),
            share_kernel: false,
            nics: SPARE_NICS,
            disks: SPARE_DISKS,
            host_sockets: Vec::new(),
            allowed_annotations: Vec::new(),
        }
    }
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
        [VMM.find(&config.vmm), KERNEL.find(&config.kernel), INITRAMFS.find(&config.initramfs)]
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
        parse(&text, path)
    }

    /// Number of spare network devices, within its limits.
    fn nics(&self, path: &Path) -> Result<u8> {
        at_most(MAX_NET_DEVICES, "nics", self.nics, path)
    }

    /// Number of places for disks of a pod, within its limits.
    fn disks(&self, path: &Path) -> Result<u8> {
        at_most(MAX_DISK_SLOTS, "disks", self.disks, path)
    }

    /// Paths of the sockets that containers may mount. Each is absolute.
    fn host_sockets(&self, path: &Path) -> Result<&[PathBuf]> {
        match self.host_sockets.iter().find(|socket| !socket.is_absolute()) {
            None => Ok(&self.host_sockets),
            Some(socket) => Err(Error::new(format!(
                "host_sockets in {} has {}, which is not an absolute path",
                path.display(),
                socket.display()
            ))),
        }
    }

    /// Checks all that the types of the keys do not. The files have to exist.
    fn check(&self, path: &Path) -> Result<()> {
        self.nics(path)?;
        self.disks(path)?;
        self.host_sockets(path)?;
        let params = &self.kernel_params;
        let printable = params.bytes().all(|byte| matches!(byte, b' '..=b'~'));
        if params.len() > MAX_KERNEL_PARAMS || !printable {
            return Err(Error::new(format!(
                "kernel_params in {} has to be {MAX_KERNEL_PARAMS} printable ASCII characters at \
                 most",
                path.display()
            )));
        }
        let files = [(VMM, &self.vmm), (KERNEL, &self.kernel), (INITRAMFS, &self.initramfs)];
        for (search, file) in files.into_iter().filter(|(_, file)| !file.as_os_str().is_empty()) {
            search.accept(file.clone(), &format!("{:?} in {}", search.key, path.display()))?;
        }
        Ok(())
    }
}

/// Checks a settings file by itself, without the environment. Returns its `allowed_annotations`:
/// the names of annotations are not known here.
///
/// # Errors
///
/// Names the file, with the line or the key.
pub fn check_file(path: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(path).explain(|| format!("cannot read {}", path.display()))?;
    let config: ConfigFile = parse(&text, path)?;
    config.check(path)?;
    Ok(config.allowed_annotations)
}

/// The number `value` that the file at `path` sets under `name`, which has to be from 0 to `most`.
fn at_most(most: u8, name: &str, value: u8, path: &Path) -> Result<u8> {
    if value <= most {
        return Ok(value);
    }
    let path = path.display();
    Err(Error::new(format!("{name} in {path} is {value}; it has to be from 0 to {most}")))
}

impl Search {
    fn find(&self, configured: &Path) -> Result<PathBuf> {
        if let Some(path) = env::var_os(self.variable).filter(|v| !v.is_empty()) {
            return self.accept(PathBuf::from(path), &format!("${}", self.variable));
        }
        if !configured.as_os_str().is_empty() {
            return self.accept(configured.to_owned(), &format!("{:?} in {CONFIG_FILE}", self.key));
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
        Err(env::VarError::NotPresent) => Ok(ConfigFile::of_host()?.kernel_params.clone()),
        Err(env::VarError::NotUnicode(_)) => {
            Err(Error::new("ISOPOD_KERNEL_PARAMS is not valid UTF-8"))
        }
    }
}

/// Tells whether microVMs share the pages of the guest kernel that it does not change. This is the
/// key `share_kernel` of `/etc/isopod/config.toml`, by default false.
pub fn share_kernel() -> Result<bool> {
    Ok(ConfigFile::of_host()?.share_kernel)
}

/// Number of network devices for a microVM whose namespace is empty when the container is created.
/// This is the key `nics` of `/etc/isopod/config.toml`, by default [`SPARE_NICS`].
pub fn nics() -> Result<u8> {
    ConfigFile::of_host()?.nics(Path::new(CONFIG_FILE))
}

/// Annotations of Isopod's own that containerd's shim takes from a config.json: the key
/// `allowed_annotations` of `/etc/isopod/config.toml`, by default none.
pub fn allowed_annotations() -> Result<&'static [String]> {
    Ok(&ConfigFile::of_host()?.allowed_annotations)
}

/// Unix sockets of the host that containers may mount. These are the paths of the key `host_sockets`
/// of `/etc/isopod/config.toml`. A path that ends in `/*` means all sockets of a directory.
pub fn host_sockets() -> Result<&'static [PathBuf]> {
    ConfigFile::of_host()?.host_sockets(Path::new(CONFIG_FILE))
}

/// Number of places for disks of further containers in the microVM of a pod. This is the key
/// `disks` of `/etc/isopod/config.toml`, by default [`SPARE_DISKS`].
pub fn disks() -> Result<u8> {
    ConfigFile::of_host()?.disks(Path::new(CONFIG_FILE))
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
        assert_eq!(ConfigFile::read(&path).unwrap().vmm, Path::new("/x"));
        fs::write(&path, "kernel_params = \"nohz=off\"\nshare_kernel = true\n").unwrap();
        let config = ConfigFile::read(&path).unwrap();
        assert_eq!(config.kernel_params, "nohz=off");
        assert!(config.share_kernel);
        assert_eq!(ConfigFile::read(&dir.path().join("none")).unwrap(), ConfigFile::default());
    }

    #[test]
    fn a_file_is_checked_by_itself() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        let check = |text: &str| {
            fs::write(&path, text).unwrap();
            check_file(&path).map_err(|error| error.message)
        };
        assert_eq!(check("").unwrap(), Vec::<String>::new());
        assert_eq!(check("nics = 8\nallowed_annotations = [\"a\"]\n").unwrap(), ["a"]);
        for (text, named) in [
            ("nics = 9\n", "nics in "),
            ("disks = 8\n", "disks in "),
            ("host_sockets = [\"a\"]\n", "host_sockets in "),
            ("\nnics = 300\n", "line 2"),
            ("kernel_params = \"a\\n\"\n", "kernel_params in "),
            ("kernel = \"/nonexistent\"\n", "the guest kernel is missing: /nonexistent"),
            ("allowed_annotations = \"x\"\n", "line 1"),
            ("x = [\n", "line "),
        ] {
            let message = check(text).unwrap_err();
            assert!(message.contains(named) && message.contains("config.toml"), "{message}");
        }
        assert!(check_file(&dir.path().join("none")).is_err());
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

//! An OCI bundle: read and checked whole before anything on the host is touched.

mod check;
mod default;
mod features;
#[cfg(test)]
mod fields;
mod guest;
mod id_map;
mod kernel;
mod mount_options;
mod owner;
mod pod;
mod propagation;
mod scheduling;
mod seccomp;
mod shm;
mod size;
mod spelling;
mod unknown;
mod unsupported;
mod update;

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{Process, Spec};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

pub use self::{
    default::{capabilities, default_spec, rootless_spec, write_spec},
    features::features,
    guest::{Inner, InnerOf, guest_processors, guest_spec},
    id_map::IdMap,
    pod::{Joined, is_first_of_pod},
    propagation::Propagation,
    seccomp::Filter,
    shm::Shm,
    size::{VmSize, cpu_list_len},
    update::{beyond_vm, check_fits, parse_resources, update_resources},
};
pub(crate) use self::{
    guest::{shared_hook, shared_inner, shared_name},
    pod::of_pod,
};
use crate::{
    error::{Error, Explain, Result},
    network::Namespace,
};

/// Version of the OCI runtime specification that this runtime follows.
pub const SPEC_VERSION: &str = "1.2.0";

/// A bundle that passed every check, with what the sandbox needs of it.
#[derive(Debug)]
pub struct Bundle {
    /// The bundle's directory, absolute and without symbolic links.
    pub dir: PathBuf,
    /// config.json, without `linux.seccomp`, which the filter takes the place of.
    pub spec: Spec,
    /// What `linux.seccomp` has become.
    pub seccomp: Option<Filter>,
    /// The root file system's directory on the host, absolute and without symbolic links.
    pub rootfs: PathBuf,
    /// The bind mounts, in the order of `mounts`.
    pub binds: Vec<Bind>,
    /// The programs of the createContainer hooks, which the guest runs: absolute paths on the host.
    pub hooks: Vec<PathBuf>,
    /// Size of the microVM.
    pub vm: VmSize,
    /// The microVM has virtualisation extensions.
    pub nested: bool,
    /// Which namespace's network the container gets.
    pub network: Namespace,
    /// How many interfaces that namespace may get after create, if config.json says it.
    pub nics: Option<u8>,
    /// Which namespaces of its pod it shares, in whose microVM it then lives.
    pub joined: Vec<Joined>,
}

/// A bind mount's host side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// Position in `mounts` of config.json.
    pub mount: usize,
    /// What is bound: an absolute path on the host.
    pub source: PathBuf,
    /// A directory, not a file.
    pub directory: bool,
    /// Mounts below the source come along (`rbind`).
    pub recursive: bool,
    /// The guest may only read.
    pub read_only: bool,
    /// Which later mounts of the host arrive below it.
    pub propagation: Propagation,
    /// Whose its files are instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id_map: Option<IdMap>,
    /// The tmpfs of the guest that takes its place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shm: Option<Shm>,
}

impl Bundle {
    /// Reads and checks the bundle in `dir`. `command` takes the place of `process.args`.
    ///
    /// Warnings about what is not honoured go to the log.
    ///
    /// # Errors
    ///
    /// The first thing found that is missing, malformed or not supported, by name.
    pub fn load(dir: &Path, command: Option<Vec<String>>) -> Result<Self> {
        let dir = canonical_dir(dir, "the bundle")
            .map_err(|e| Error::new(format!("{} ({WHAT_A_BUNDLE_IS})", e.message)))?;
        let path = dir.join("config.json");
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == ErrorKind::NotFound => {
                return Err(Error::new(format!(
                    "{} is not a bundle: it has no config.json ({WHAT_A_BUNDLE_IS})",
                    dir.display()
                )));
            }
            Err(e) => return Err(e).explain(|| format!("cannot read {}", path.display())),
        };
        let mut spec = parse_spec(&path, &text)?;
        if let (Some(command), Some(process)) = (command, spec.process_mut()) {
            process.set_args(Some(command));
        }
        check::spec(&spec)?;
        let root = spec.root().as_ref().ok_or_else(|| Error::new("config.json has no root"))?;
        let rootfs = canonical_dir(&dir.join(root.path()), "root.path")?;
        let binds = check::binds(&dir, &spec)?;
        let hooks = check::guest_hooks(&spec)?;
        let vm = VmSize::of(&spec)?;
        let nested = size::nested(&spec)?;
        let network = Namespace::of(&spec)?;
        let nics = size::nics(&spec)?;
        let joined = pod::joined(&spec)?;
        let mut seccomp = None;
        if let Some(linux) = spec.linux_mut() {
            seccomp = linux.seccomp().as_ref().map(seccomp::compile).transpose()?;
            linux.set_seccomp(None);
        }
        Ok(Self { dir, spec, seccomp, rootfs, binds, hooks, vm, nested, network, nics, joined })
    }
}

/// The way out for somebody who has named something else, or nothing.
const WHAT_A_BUNDLE_IS: &str = "name a directory with a config.json and a root file system by \
                                --bundle; without it, it is the working directory";

/// Reads the OCI `process` object that `exec --process` names.
///
/// # Errors
///
/// As [`Bundle::load`].
pub fn load_process(path: &Path) -> Result<Process> {
    let text = fs::read(path).explain(|| format!("cannot read {}", path.display()))?;
    let what = || path.display().to_string();
    let mut raw: Value = serde_json::from_slice(&text).explain(what)?;
    spelling::correct_process(&mut raw);
    let process: Process = typed(&text, &raw).explain(what)?;
    unsupported::refuse_process(&raw)?;
    let kept = serde_json::to_value(&process).explain(what)?;
    unknown::warn(&what(), &raw, &kept);
    check::process(&process)?;
    Ok(process)
}

/// Checks a `process` object that was put together from options.
///
/// # Errors
///
/// The first thing found that is malformed, by name.
pub fn check_process(process: &Process) -> Result<()> {
    check::process(process)
}

fn parse_spec(path: &Path, text: &[u8]) -> Result<Spec> {
    // As an object first: the types would take a list for one without fields.
    let what = || path.display().to_string();
    let raw: Map<String, Value> = serde_json::from_slice(text).explain(what)?;
    let mut raw = Value::Object(raw);
    spelling::correct(&mut raw);
    let spec: Spec = typed(text, &raw).explain(what)?;
    unsupported::refuse(&raw)?;
    let kept = serde_json::to_value(&spec).explain(|| path.display().to_string())?;
    unknown::warn("config.json", &raw, &kept);
    unsupported::note_no_effect(&raw);
    Ok(spec)
}

/// A document, corrected, as its type. An error names the line where the text has the same one.
fn typed<T: DeserializeOwned>(text: &[u8], corrected: &Value) -> serde_json::Result<T> {
    T::deserialize(corrected).map_err(|error| match serde_json::from_slice::<T>(text) {
        Err(with_line) if with_line.to_string().starts_with(&error.to_string()) => with_line,
        _ => error,
    })
}

fn canonical_dir(path: &Path, what: &str) -> Result<PathBuf> {
    let found = fs::canonicalize(path).explain(|| format!("{what} {}", path.display()))?;
    if found.is_dir() {
        return Ok(found);
    }
    Err(Error::new(format!("{what} {} is not a directory", path.display())))
}

#[cfg(test)]
mod support;
#[cfg(test)]
mod tests;

//! Reads and checks a bundle or a `process` object.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{Process, Spec};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::{
    annotations,
    bind::{self, Bind},
    check,
    disk::{self, Disk},
    network_namespace::NetworkNamespace,
    oci_spec_quirks,
    pod::{self, Joined},
    pod_files::PodFiles,
    refused_fields,
    seccomp::{self, Filter},
    unknown_fields,
    vm_size::{self, VmSize},
};
use crate::error::{Error, Explain, Result};

/// A bundle that has passed every check, with the values that the sandbox needs.
#[derive(Debug, Serialize, Deserialize)]
pub struct Bundle {
    /// The bundle's directory, absolute and without symbolic links.
    pub dir: PathBuf,
    /// config.json without `linux.seccomp`: the compiled filter replaces it.
    pub spec: Spec,
    /// The compiled filter of `linux.seccomp`.
    pub seccomp: Option<Filter>,
    /// The root file system's directory on the host, absolute and without symbolic links.
    pub rootfs: PathBuf,
    /// The bind mounts, in the order of `mounts`.
    pub binds: Vec<Bind>,
    /// The block devices of the host that the guest gets.
    pub disks: Vec<Disk>,
    /// The programs of the createContainer hooks, which the guest runs: absolute paths on the host.
    pub hooks: Vec<PathBuf>,
    /// Size of the microVM.
    pub vm: VmSize,
    /// The guest's processors have virtualisation extensions.
    pub nested: bool,
    /// The network namespace whose interfaces the container gets.
    pub network: NetworkNamespace,
    /// Number of interfaces that the network namespace may get after create, if an annotation sets
    /// it.
    pub nics: Option<u8>,
    /// Namespaces of its pod that the container shares. With one, it lives in the pod's microVM.
    pub joined: Vec<Joined>,
}

impl Bundle {
    /// Reads and checks the bundle in `dir`. `command` replaces `process.args`.
    ///
    /// The error names the first field that is missing, malformed or not supported. Fields that are
    /// not honoured give a warning in the log.
    pub fn load(dir: &Path, command: Option<Vec<String>>) -> Result<Self> {
        Self::load_with(dir, command, None)
    }

    /// Like [`Bundle::load`], of a container that gets `files` of its pod, unless config.json has
    /// mounts in their places.
    pub(crate) fn load_in_pod(dir: &Path, files: Option<&PodFiles>) -> Result<Self> {
        Self::load_with(dir, None, files)
    }

    fn load_with(
        dir: &Path,
        command: Option<Vec<String>>,
        files: Option<&PodFiles>,
    ) -> Result<Self> {
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
        if let Some(files) = files {
            files.mount(&mut spec);
        }
        pod::check(&spec)?;
        annotations::check(&spec)?;
        check::spec(&spec)?;
        let root = spec.root().as_ref().ok_or_else(|| Error::new("config.json has no root"))?;
        let rootfs = canonical_dir(&dir.join(root.path()), "root.path")?;
        let mut binds = bind::binds(&dir, &spec)?;
        if let Some(files) = files {
            files.share_memory(&mut binds);
        }
        let disks = disk::disks(&dir, &spec)?;
        let hooks = check::guest_hooks(&spec)?;
        let vm = VmSize::of(&spec)?;
        let nested = vm_size::nested(&spec)?;
        let network = NetworkNamespace::of(&spec)?;
        let nics = vm_size::nics(&spec)?;
        let joined = pod::joined(&spec)?;
        let mut seccomp = None;
        if let Some(linux) = spec.linux_mut() {
            seccomp = linux.seccomp().as_ref().map(seccomp::compile).transpose()?;
            linux.set_seccomp(None);
        }
        Ok(Self {
            dir,
            spec,
            seccomp,
            rootfs,
            binds,
            disks,
            hooks,
            vm,
            nested,
            network,
            nics,
            joined,
        })
    }
}

/// Advice for an error about a directory that is no bundle.
const WHAT_A_BUNDLE_IS: &str = "name a directory with a config.json and a root file system by \
                                --bundle; without it, it is the working directory";

/// Reads and checks the OCI `process` object in the file that `exec --process` names. The error is
/// as that of [`Bundle::load`].
pub fn load_process(path: &Path) -> Result<Process> {
    let text = fs::read(path).explain(|| format!("cannot read {}", path.display()))?;
    parse_process(&path.display().to_string(), &text)
}

/// Like [`load_process`], of the text of the object, which errors call `name`.
pub fn parse_process(name: &str, text: &[u8]) -> Result<Process> {
    let what = || name.to_owned();
    let mut raw: Value = serde_json::from_slice(text).explain(what)?;
    oci_spec_quirks::correct_process(&mut raw);
    let process: Process = typed(text, &raw).explain(what)?;
    refused_fields::refuse_process(&raw)?;
    let kept = serde_json::to_value(&process).explain(what)?;
    unknown_fields::warn(name, &raw, &kept);
    check::process(&process)?;
    Ok(process)
}

/// Checks a `process` object that was built from options. The error names the first malformed
/// field.
pub fn check_process(process: &Process) -> Result<()> {
    check::process(process)
}

fn parse_spec(path: &Path, text: &[u8]) -> Result<Spec> {
    // Parsed as an object first, because the types would accept a list as an object without fields.
    let what = || path.display().to_string();
    let raw: Map<String, Value> = serde_json::from_slice(text).explain(what)?;
    let mut raw = Value::Object(raw);
    oci_spec_quirks::correct(&mut raw);
    let spec: Spec = typed(text, &raw).explain(what)?;
    refused_fields::refuse(&raw)?;
    let kept = serde_json::to_value(&spec).explain(|| path.display().to_string())?;
    unknown_fields::warn("config.json", &raw, &kept);
    refused_fields::note_no_effect(&raw);
    Ok(spec)
}

/// Converts a corrected document to its type. An error has a line number if the uncorrected text
/// gives the same error.
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

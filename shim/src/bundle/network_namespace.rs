//! The network namespace of the host that stands for the container's.

use std::{
    ffi::OsStr,
    fs::{self, File},
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::{Component, Path, PathBuf},
};

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde::{Deserialize, Serialize};

use crate::{
    bundle::pod::{Holder, holder},
    error::{Error, Explain, Result},
};

/// The file with the container's name servers.
pub(crate) const RESOLV_CONF: &str = "/etc/resolv.conf";

/// `NS_GET_NSTYPE` (linux/nsfs.h): the type of a namespace, as its `CLONE_NEW*` flag.
const NS_GET_NSTYPE: libc::c_ulong = 0xb703;

/// The network namespace whose interfaces the microVM takes over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkNamespace {
    /// No namespace: the microVM has no network device.
    None,
    /// A new namespace, which lives as long as the sandbox.
    Own,
    /// The namespace at this path, made by an engine.
    Path(PathBuf),
    /// The namespace of the container's pod, at this path. The microVM already has its interfaces.
    Pod(PathBuf),
}

impl NetworkNamespace {
    /// The network namespace that config.json asks for. A microVM cannot have the host's network or
    /// the namespace of another container, so these are refused.
    pub fn of(spec: &Spec) -> Result<Self> {
        let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
        let network = namespaces
            .into_iter()
            .flatten()
            .find(|namespace| namespace.typ() == LinuxNamespaceType::Network);
        let Some(network) = network else {
            return if mounts_resolv_conf(spec) {
                Err(host_network(
                    "linux.namespaces has no network namespace and /etc/resolv.conf is mounted",
                ))
            } else {
                Ok(Self::None)
            };
        };
        match network.path().as_deref().filter(|path| !path.as_os_str().is_empty()) {
            None => Ok(Self::Own),
            Some(path) if matches!(holder(spec, network), Some(Holder::Process(_))) => {
                Ok(Self::Pod(path.to_owned()))
            }
            Some(path) => {
                check(path)?;
                Ok(Self::Path(path.to_owned()))
            }
        }
    }

    /// Puts the name of the namespace in front of an error about it.
    pub(crate) fn explain(&self, mut error: Error) -> Error {
        error.message = format!("{}: {}", self.name(), error.message);
        error
    }

    /// The name of the namespace in messages.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::None => "no network namespace".to_owned(),
            Self::Own => "the container's network namespace".to_owned(),
            Self::Path(path) | Self::Pod(path) => format!("network namespace {}", path.display()),
        }
    }
}

/// Tells whether /etc/resolv.conf is mounted. Engines mount it in every container, so a bundle
/// without it wants no network at all.
fn mounts_resolv_conf(spec: &Spec) -> bool {
    let mounts = spec.mounts().iter().flatten();
    mounts.map(|mount| mount.destination()).any(|path| path == RESOLV_CONF)
}

fn host_network(how: &str) -> Error {
    Error::new(format!(
        "{how}, which asks for the host's network (as `--network host` does): a microVM has a \
         network stack of its own and cannot use the host's; use another network and publish ports, \
         or `--network none`"
    ))
}

/// Tells whether `file` is a network namespace.
pub(crate) fn is_network_namespace(file: &File) -> bool {
    // SAFETY: this request takes no argument and changes nothing, whatever the file is.
    let kind = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) };
    kind == libc::CLONE_NEWNET
}

fn check(path: &Path) -> Result<()> {
    let field = format!("linux.namespaces: the network namespace {}", path.display());
    if !path.is_absolute() {
        return Err(Error::new(format!("{field} is not an absolute path")));
    }
    let file = File::open(path).map_err(|e| not_there(path, &field, e))?;
    let metadata = file.metadata().explain(|| field.clone())?;
    if !is_network_namespace(&file) {
        return Err(Error::new(format!("{field} is not a network namespace")));
    }
    let own =
        fs::metadata("/proc/self/ns/net").explain(|| "cannot look at /proc/self/ns".into())?;
    if (metadata.dev(), metadata.ino()) == (own.dev(), own.ino()) {
        return Err(host_network(&format!("{field} is the host's")));
    }
    match process_behind(path) {
        None => Ok(()),
        Some(process) => Err(another_container(&field, &process)),
    }
}

/// The error of a path that cannot be opened. If it is the path of a process that has ended, the
/// error says so.
fn not_there(path: &Path, field: &str, e: std::io::Error) -> Error {
    match process_behind(path) {
        Some(process) if !Path::new("/proc").join(&process).exists() => {
            Error::new(format!("{field} does not exist: process {process} has ended"))
        }
        _ => Error::because(field, e),
    }
}

fn another_container(field: &str, process: &str) -> Error {
    Error::new(format!(
        "{field} is that of process {process}, another container's (as `--network container:` asks \
         for): a microVM takes the interfaces of a namespace for itself, so containers in different \
         microVMs cannot share one; give each a network of its own"
    ))
}

/// The process in `path`, if `path` is the kernel's link to the namespace of a process.
fn process_behind(path: &Path) -> Option<String> {
    // The directory of a process that has ended is gone, so its path is taken as it is.
    let folder = path.parent()?;
    let folder = fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
    let path = folder.join(path.file_name()?);
    let mut parts = path.components().skip(1).map(Component::as_os_str);
    if parts.next() != Some(OsStr::new("proc")) {
        return None;
    }
    Some(parts.next()?.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(namespaces: &str, mounts: &str) -> Result<NetworkNamespace> {
        let json = format!(
            r#"{{"ociVersion":"1.0.2","linux":{{"namespaces":[{namespaces}]}},"mounts":[{mounts}]}}"#
        );
        NetworkNamespace::of(&serde_json::from_str(&json).unwrap())
    }

    const RESOLV_CONF: &str =
        r#"{"destination":"/etc/resolv.conf","type":"bind","source":"/x","options":["rbind"]}"#;

    #[test]
    fn a_namespace_without_a_path_is_a_new_one() {
        assert_eq!(of(r#"{"type":"network"}"#, RESOLV_CONF).unwrap(), NetworkNamespace::Own);
        assert_eq!(of(r#"{"type":"network","path":""}"#, "").unwrap(), NetworkNamespace::Own);
        assert_eq!(of(r#"{"type":"pid"}"#, "").unwrap(), NetworkNamespace::None);
    }

    #[test]
    fn the_hosts_network_is_refused_with_what_to_do() {
        let error = of(r#"{"type":"pid"}"#, RESOLV_CONF).unwrap_err();
        assert!(error.message.contains("--network host"), "{error}");
        let error = of(r#"{"type":"network","path":"/proc/self/ns/net"}"#, "").unwrap_err();
        assert!(error.message.contains("--network host"), "{error}");
    }

    #[test]
    fn what_is_no_network_namespace_is_refused() {
        for (path, why) in [
            ("/proc/self/ns/uts", "is not a network namespace"),
            ("/dev/null", "is not a network namespace"),
            ("netns/x", "is not an absolute path"),
            ("/run/netns/isopod-has-none", "no such file"),
            ("/proc/999999999/ns/net", "process 999999999 has ended"),
        ] {
            let error = of(&format!(r#"{{"type":"network","path":"{path}"}}"#), "").unwrap_err();
            assert!(error.message.contains(why) && error.message.contains(path), "{error}");
        }
    }
}

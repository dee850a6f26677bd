//! Which network namespace of the host stands for the container's.

use std::{
    ffi::OsStr,
    fs::{self, File},
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::MetadataExt,
    },
    path::{Component, Path, PathBuf},
};

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use rustix::{
    io::Errno,
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};
use serde::{Deserialize, Serialize};

use super::resolver::RESOLV_CONF;
use crate::{
    bundle::of_pod,
    error::{Error, Explain, Result},
};

/// `NS_GET_NSTYPE` (linux/nsfs.h): which `CLONE_NEW*` made the namespace.
const NS_GET_NSTYPE: libc::c_ulong = 0xb703;

/// The network namespace whose interfaces the microVM takes over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Namespace {
    /// None: the microVM has no network device.
    None,
    /// A new one, which lives as long as the sandbox.
    Own,
    /// The one at this path, made by an engine.
    Path(PathBuf),
    /// The one at this path, whose interfaces the microVM has already: that of the container's pod.
    Pod(PathBuf),
}

impl Namespace {
    /// What config.json asks for.
    ///
    /// # Errors
    ///
    /// If it asks for what a microVM cannot have: the host's network, or that of another container.
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
            Some(path) if of_pod(spec, network).is_some() => Ok(Self::Pod(path.to_owned())),
            Some(path) => {
                check(path)?;
                Ok(Self::Path(path.to_owned()))
            }
        }
    }

    /// Moves this process there, which must not have started a thread yet.
    ///
    /// # Errors
    ///
    /// If that is not permitted, or the namespace is gone.
    pub(crate) fn enter(&self) -> Result<()> {
        match self {
            Self::None => Ok(()),
            // SAFETY: a new network namespace leaves descriptors and memory as they are.
            Self::Own => unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
                .map_err(|e| not_permitted(e, "make a network namespace")),
            Self::Path(path) | Self::Pod(path) => enter_path(path),
        }
    }

    /// Puts its name before what is wrong in it.
    pub(super) fn explain(&self, mut error: Error) -> Error {
        error.message = format!("{}: {}", self.name(), error.message);
        error
    }

    /// How to name it in messages.
    pub(super) fn name(&self) -> String {
        match self {
            Self::None => "no network namespace".to_owned(),
            Self::Own => "the container's network namespace".to_owned(),
            Self::Path(path) | Self::Pod(path) => format!("network namespace {}", path.display()),
        }
    }
}

/// Moves the calling thread into the network namespace at `path`.
pub(super) fn enter_path(path: &Path) -> Result<()> {
    let what = || format!("enter network namespace {}", path.display());
    let namespace = File::open(path).explain(|| format!("cannot {}", what()))?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|e| not_permitted(e, &what()))
}

fn not_permitted(e: Errno, what: &str) -> Error {
    match e {
        Errno::PERM => Error::new(format!("no permission to {what}: isopod has to run as root")),
        e => Error::because(format!("cannot {what}"), e),
    }
}

/// Engines mount one in every container, so a bundle without is one that wants no network at all.
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

/// Whether there is a network namespace at `path`.
pub(super) fn is_there(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| is_network_namespace(&file))
}

fn is_network_namespace(file: &File) -> bool {
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
    match process_of(path) {
        None => Ok(()),
        Some(process) => Err(another_container(&field, &process)),
    }
}

/// A process that has just ended is another container's too.
fn not_there(path: &Path, field: &str, e: std::io::Error) -> Error {
    match process_of(path) {
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

/// The process, if the path is that of a process's namespace: the kernel's own link to it.
fn process_of(path: &Path) -> Option<String> {
    // The directory of a process that has ended is gone.
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

    fn of(namespaces: &str, mounts: &str) -> Result<Namespace> {
        let json = format!(
            r#"{{"ociVersion":"1.0.2","linux":{{"namespaces":[{namespaces}]}},"mounts":[{mounts}]}}"#
        );
        Namespace::of(&serde_json::from_str(&json).unwrap())
    }

    const RESOLV_CONF: &str =
        r#"{"destination":"/etc/resolv.conf","type":"bind","source":"/x","options":["rbind"]}"#;

    #[test]
    fn a_namespace_without_a_path_is_a_new_one() {
        assert_eq!(of(r#"{"type":"network"}"#, RESOLV_CONF).unwrap(), Namespace::Own);
        assert_eq!(of(r#"{"type":"network","path":""}"#, "").unwrap(), Namespace::Own);
        assert_eq!(of(r#"{"type":"pid"}"#, "").unwrap(), Namespace::None);
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

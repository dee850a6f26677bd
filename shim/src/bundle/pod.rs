//! Containers of a pod: they share namespaces, and therefore a microVM.

use std::{
    collections::BTreeMap,
    path::{Component, Path},
};

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Annotations for a container's part in its pod: that of CRI-O and Podman, and that of containerd.
/// A `container` belongs to a pod whose `sandbox` has been made before it.
pub(super) const CONTAINER_TYPES: [&str; 2] =
    ["io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri.container-type"];

/// A namespace of another container that is to be shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joined {
    /// The type of the namespace.
    pub kind: LinuxNamespaceType,
    /// The process whose namespace it is: the other container's pid on the host.
    pub pid: i32,
}

/// The namespaces that a member of a pod shares. Empty for all other containers. A namespace that
/// containers of one microVM cannot share is refused.
pub(super) fn joined(spec: &Spec) -> Result<Vec<Joined>> {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let joined = namespaces.into_iter().flatten().filter_map(|n| Some((n, of_pod(spec, n)?)));
    joined
        .map(|(namespace, pid)| match namespace.typ() {
            LinuxNamespaceType::Mount
            | LinuxNamespaceType::User
            | LinuxNamespaceType::Time
            | LinuxNamespaceType::Cgroup => Err(Error::new(format!(
                "linux.namespaces: the {kind} namespace of process {pid} cannot be shared: \
                     containers of a pod can share network, ipc, uts and pid",
                kind = kind_name(namespace.typ()),
            ))),
            kind => Ok(Joined { kind, pid }),
        })
        .collect()
}

/// The process whose namespace `namespace` is, if the container is a member of a pod and the
/// namespace is another container's.
pub(crate) fn of_pod(spec: &Spec, namespace: &LinuxNamespace) -> Option<i32> {
    let annotations = spec.annotations().as_ref()?;
    let mut types = CONTAINER_TYPES.iter().filter_map(|key| annotations.get(*key));
    if types.next()? != "container" {
        return None;
    }
    process_of(namespace.path().as_deref()?)
}

/// Tells whether the container is the first of its pod. An engine makes it to hold the namespaces
/// that the others share.
pub fn is_first_of_pod(annotations: &BTreeMap<String, String>) -> bool {
    CONTAINER_TYPES.iter().any(|key| annotations.get(*key).is_some_and(|kind| kind == "sandbox"))
}

/// The specification's name for a type of namespace.
pub(super) fn kind_name(kind: LinuxNamespaceType) -> &'static str {
    match kind {
        LinuxNamespaceType::Mount => "mount",
        LinuxNamespaceType::Cgroup => "cgroup",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::User => "user",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::Network => "network",
        LinuxNamespaceType::Time => "time",
    }
}

/// The process in a path such as `/proc/17/ns/net`.
fn process_of(path: &Path) -> Option<i32> {
    let names: Option<Vec<&str>> = path
        .components()
        .skip(1)
        .map(|part| match part {
            Component::Normal(name) => name.to_str(),
            _ => None,
        })
        .collect();
    match names?[..] {
        ["proc", pid, "ns", _] if path.is_absolute() => pid.parse().ok().filter(|pid| *pid > 0),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(container_type: &str, namespaces: &str) -> Result<Vec<Joined>> {
        let json = format!(
            r#"{{"ociVersion":"1.0.2","linux":{{"namespaces":[{namespaces}]}},
                "annotations":{{"io.kubernetes.cri-o.ContainerType":"{container_type}"}}}}"#
        );
        joined(&serde_json::from_str(&json).unwrap())
    }

    #[test]
    fn a_container_of_a_pod_shares_what_is_a_processs() {
        let namespaces = r#"{"type":"network","path":"/proc/17/ns/net"},{"type":"mount"},
            {"type":"uts","path":"/proc/17/ns/uts"},{"type":"ipc","path":"/run/ipcns/x"}"#;
        let kinds = [LinuxNamespaceType::Network, LinuxNamespaceType::Uts];
        assert_eq!(
            of("container", namespaces).unwrap(),
            kinds.map(|kind| Joined { kind, pid: 17 })
        );
        assert_eq!(of("sandbox", namespaces).unwrap(), []);
    }

    #[test]
    fn paths_of_processes() {
        for path in ["/proc/self/ns/net", "proc/1/ns/net", "/proc/1/fd/3", "/proc/0/ns/net", "/"] {
            assert_eq!(process_of(Path::new(path)), None, "{path}");
        }
        assert_eq!(process_of(Path::new("/proc/1/ns/net")), Some(1));
    }

    #[test]
    fn what_cannot_be_shared_is_refused() {
        let error = of("container", r#"{"type":"user","path":"/proc/17/ns/user"}"#).unwrap_err();
        assert!(error.message.contains("the user namespace of process 17"), "{error}");
    }
}

//! Containers of a pod: they share namespaces, and therefore a microVM.
//!
//! | engine | the namespaces that a container shares | found by |
//! |---|---|---|
//! | containerd, Podman | paths such as `/proc/17/ns/net` | the process of the pod's first container |
//! | CRI-O | files that its `pinns` has bound namespaces to | the annotation with the pod's id |

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    os::unix::fs::MetadataExt,
    path::{Component, Path},
};

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Annotations for a container's part in its pod: that of CRI-O and Podman, and that of containerd.
/// A `container` belongs to a pod whose `sandbox` has been made before it.
pub(super) const CONTAINER_TYPES: [&str; 2] = [CRIO_TYPE, CONTAINERD_TYPE];

/// containerd's annotation for a container's part in its pod, which only its plugin for Kubernetes
/// sets.
pub(crate) const CONTAINERD_TYPE: &str = "io.kubernetes.cri.container-type";

/// CRI-O's annotation for a container's part in its pod.
pub(super) const CRIO_TYPE: &str = "io.kubernetes.cri-o.ContainerType";

/// CRI-O's annotation with the id of the pod. Podman has it too.
pub(crate) const POD_ID: &str = "io.kubernetes.cri-o.SandboxID";

/// Annotation with the name of the engine, and CRI-O's name. Only CRI-O pins namespaces of pods.
const ENGINE: (&str, &str) = ("io.container.manager", "cri-o");

/// Namespaces of a pod that CRI-O pins.
const PINNED: [LinuxNamespaceType; 3] =
    [LinuxNamespaceType::Network, LinuxNamespaceType::Ipc, LinuxNamespaceType::Uts];

/// Namespaces that a pod of Kubernetes may have of the host, with the field that asks for it.
const OF_THE_HOST: [(LinuxNamespaceType, &str, &str); 3] = [
    (LinuxNamespaceType::Network, "hostNetwork", "network"),
    (LinuxNamespaceType::Pid, "hostPID", "processes"),
    (LinuxNamespaceType::Ipc, "hostIPC", "ipc"),
];

/// Refuses a pod of Kubernetes that is to be in a namespace of the host.
pub(super) fn check(spec: &Spec) -> Result<()> {
    if annotation(spec, CONTAINERD_TYPE) != Some("sandbox") && !is_of_crio(spec) {
        return Ok(());
    }
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    // CRI-O pins the host's namespace for a pod that asks for it.
    let has = |kind| {
        let of = |namespace: &&LinuxNamespace| namespace.typ() == kind;
        let found = namespaces.into_iter().flatten().find(of);
        found.is_some_and(|namespace| !is_pinned(spec, namespace) || !is_the_hosts(namespace))
    };
    match OF_THE_HOST.into_iter().find(|(kind, ..)| !has(*kind)) {
        None => Ok(()),
        Some((_, field, what)) => Err(Error::new(format!(
            "the pod asks for the host's {what} ({field}: true): a pod in a microVM has a kernel of \
             its own and cannot have the host's; leave {field} out, or run the pod with another \
             RuntimeClass"
        ))),
    }
}

/// Tells whether the path of a namespace leads to the host's own.
fn is_the_hosts(namespace: &LinuxNamespace) -> bool {
    let file = match namespace.typ() {
        LinuxNamespaceType::Network => "net",
        LinuxNamespaceType::Uts => "uts",
        _ => "ipc",
    };
    let own = format!("/proc/self/ns/{file}");
    namespace.path().as_deref().is_some_and(|path| is_same(path, Path::new(&own)))
}

/// Tells whether two paths lead to one namespace.
pub(crate) fn is_same(one: &Path, other: &Path) -> bool {
    let of = |path: &Path| fs::metadata(path).map(|found| (found.dev(), found.ino()));
    matches!((of(one), of(other)), (Ok(one), Ok(other)) if one == other)
}

/// A namespace of another container that is to be shared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joined {
    /// The type of the namespace.
    pub kind: LinuxNamespaceType,
    /// The container whose namespace it is.
    pub holder: Holder,
}

/// The holder of a namespace that a container shares.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Holder {
    /// The container with this pid on the host.
    Process(i32),
    /// The first container of the pod with this id.
    Pod(String),
}

/// The namespaces that a member of a pod shares. Empty for all other containers. A namespace that
/// containers of one microVM cannot share is refused.
pub(super) fn joined(spec: &Spec) -> Result<Vec<Joined>> {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let joined = namespaces.into_iter().flatten().filter_map(|n| Some((n, holder(spec, n)?)));
    joined
        .map(|(namespace, holder)| match (namespace.typ(), &holder) {
            (
                LinuxNamespaceType::Mount | LinuxNamespaceType::Time | LinuxNamespaceType::Cgroup,
                Holder::Process(pid),
            ) => Err(Error::new(format!(
                "linux.namespaces: the {kind} namespace of process {pid} cannot be shared: \
                     containers of a pod can share user, network, ipc, uts and pid",
                kind = kind_name(namespace.typ()),
            ))),
            (kind, _) => Ok(Joined { kind, holder }),
        })
        .collect()
}

/// The holder of `namespace`, if the container is a member of a pod and the namespace is the pod's
/// or another container's.
pub(super) fn holder(spec: &Spec, namespace: &LinuxNamespace) -> Option<Holder> {
    let mut types = CONTAINER_TYPES.iter().filter_map(|key| annotation(spec, key));
    if types.next()? != "container" {
        return None;
    }
    if let Some(pid) = process_of(namespace.path().as_deref()?) {
        return Some(Holder::Process(pid));
    }
    let pod = annotation(spec, POD_ID).filter(|_| is_pinned(spec, namespace))?;
    Some(Holder::Pod(pod.to_owned()))
}

/// Tells whether a namespace is a file that CRI-O has made for its pod. The microVM has one in its
/// place.
pub(super) fn is_pinned(spec: &Spec, namespace: &LinuxNamespace) -> bool {
    let path = namespace.path().as_deref();
    is_of_crio(spec)
        && PINNED.contains(&namespace.typ())
        && path.is_some_and(|path| path.is_absolute() && process_of(path).is_none())
}

fn is_of_crio(spec: &Spec) -> bool {
    names_crio(|key| annotation(spec, key))
}

/// Tells whether a container of a pod is CRI-O's.
pub(crate) fn is_crios(annotations: &BTreeMap<String, String>) -> bool {
    names_crio(|key| annotations.get(key).map(String::as_str))
}

/// Tells whether annotations, of which `get` returns the values, are those of CRI-O.
fn names_crio<'a>(get: impl Fn(&str) -> Option<&'a str>) -> bool {
    let (key, name) = ENGINE;
    get(key) == Some(name) && get(POD_ID).is_some()
}

fn annotation<'a>(spec: &'a Spec, key: &str) -> Option<&'a str> {
    let annotations: Option<&HashMap<String, String>> = spec.annotations().as_ref();
    annotations?.get(key).map(String::as_str)
}

/// Tells if `namespace` is the user namespace that an engine has made for a pod, and the container
/// the first of this pod. The guest makes one with the same mappings, which config.json has too.
pub(super) fn is_user_namespace_of_pod(spec: &Spec, namespace: &LinuxNamespace) -> bool {
    namespace.typ() == LinuxNamespaceType::User
        && annotation(spec, CONTAINERD_TYPE) == Some("sandbox")
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
            kinds.map(|kind| Joined { kind, holder: Holder::Process(17) })
        );
        assert_eq!(of("sandbox", namespaces).unwrap(), []);
    }

    fn crios(kind: &str, namespaces: &str) -> Spec {
        let json = format!(
            r#"{{"ociVersion":"1.0.2","linux":{{"namespaces":[{namespaces}]}},"annotations":{{
                "io.kubernetes.cri-o.ContainerType":"{kind}","io.container.manager":"cri-o",
                "io.kubernetes.cri-o.SandboxID":"pod"}}}}"#
        );
        serde_json::from_str(&json).unwrap()
    }

    #[test]
    fn what_crio_has_pinned_is_the_pods() {
        let namespaces = r#"{"type":"network","path":"/var/run/netns/x"},{"type":"mount"},
            {"type":"ipc","path":"/var/run/ipcns/x"},{"type":"pid","path":"/proc/17/ns/pid"},
            {"type":"user","path":"/var/run/userns/x"}"#;
        let pod = || Holder::Pod("pod".to_owned());
        let expected = [
            (LinuxNamespaceType::Network, pod()),
            (LinuxNamespaceType::Ipc, pod()),
            (LinuxNamespaceType::Pid, Holder::Process(17)),
        ];
        let expected = expected.map(|(kind, holder)| Joined { kind, holder });
        assert_eq!(joined(&crios("container", namespaces)).unwrap(), expected);
        let sandbox = crios("sandbox", namespaces);
        assert_eq!(joined(&sandbox).unwrap(), []);
        let pinned = sandbox.linux().as_ref().unwrap().namespaces().as_ref().unwrap().iter();
        let pinned: Vec<bool> = pinned.map(|namespace| is_pinned(&sandbox, namespace)).collect();
        assert_eq!(pinned, [true, false, true, false, false]);
    }

    #[test]
    fn crio_pins_the_hosts_namespaces_too() {
        let own = r#"{"type":"network","path":"/run/netns/isopod-has-none"},{"type":"pid"}"#;
        check(&crios("sandbox", &format!(r#"{own},{{"type":"ipc","path":"/x"}}"#))).unwrap();
        for kind in ["sandbox", "container"] {
            let ipc = r#"{"type":"ipc","path":"/proc/self/ns/ipc"}"#;
            let error = check(&crios(kind, &format!("{own},{ipc}"))).unwrap_err();
            assert!(error.message.contains("hostIPC"), "{error}");
        }
    }

    #[test]
    fn a_pod_has_no_namespace_of_the_host() {
        let check = |kind: &str, namespaces: &str| {
            let json = format!(
                r#"{{"ociVersion":"1.0.2","linux":{{"namespaces":[{namespaces}]}},
                    "annotations":{{"{CONTAINERD_TYPE}":"{kind}"}}}}"#
            );
            check(&serde_json::from_str(&json).unwrap())
        };
        let (network, pid) = (r#"{"type":"network","path":"/run/netns/x"}"#, r#"{"type":"pid"}"#);
        let ipc = r#"{"type":"ipc"}"#;
        check("sandbox", &format!("{network},{pid},{ipc}")).unwrap();
        check("container", network).unwrap();
        for (without, field) in [
            (format!("{pid},{ipc}"), "hostNetwork"),
            (format!("{network},{ipc}"), "hostPID"),
            (format!("{network},{pid}"), "hostIPC"),
        ] {
            assert!(check("sandbox", &without).unwrap_err().message.contains(field));
        }
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
        let error = of("container", r#"{"type":"time","path":"/proc/17/ns/time"}"#).unwrap_err();
        assert!(error.message.contains("the time namespace of process 17"), "{error}");
    }
}

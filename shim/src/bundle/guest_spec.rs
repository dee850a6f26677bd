//! config.json as the agent gets it: host paths replaced by paths in the guest.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{Hook, Hooks, LinuxNamespaceType, LinuxResources, Mount, Spec};
use serde::{Deserialize, Serialize};

use isopod_protocol::{HOST_SOCKETS_DIR, JOIN_PREFIX, SHARED_DIR, SHM_DIR};

use crate::{
    bundle::{
        bind::Bind,
        disk::{self, Disk, DiskField},
        host_socket::HostSocket,
        id_map,
        load::Bundle,
        mount_options,
        seccomp::Filter,
        shm::Shm,
    },
    container_id::ContainerId,
    cpu_list::cpu_list_len,
};

/// A container as the agent makes it.
#[derive(Debug, Serialize, Deserialize)]
pub struct GuestContainer {
    /// config.json with the paths of the guest.
    pub spec: Spec,
    /// The compiled filter of `linux.seccomp`.
    pub seccomp: Option<Filter>,
    /// Shared memory that the guest has in place of the host's.
    pub shared_memory: Vec<Shm>,
    /// Block devices whose numbers and names in the guest are not in `spec` yet.
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// Sockets of the host that the agent stands for.
    #[serde(default)]
    pub host_sockets: Vec<HostSocket>,
}

impl GuestContainer {
    /// The container `id` of a bundle. `inner` are the mounts that have trees of their own, and
    /// `joins` the namespaces that it shares with other containers.
    pub fn new(
        bundle: &Bundle,
        id: &ContainerId,
        inner: &[Inner],
        joins: &[(LinuxNamespaceType, ContainerId)],
    ) -> Self {
        let (spec, binds, vcpus) = (&bundle.spec, &bundle.binds, bundle.vm.vcpus);
        let mut spec = spec.clone();
        name_disks(&mut spec, &bundle.disks);
        Self {
            spec: guest_spec(&spec, id.as_str(), binds, inner, vcpus, joins),
            seccomp: bundle.seccomp.clone(),
            shared_memory: binds.iter().filter_map(|bind| bind.shm.clone()).collect(),
            disks: bundle.disks.clone(),
            host_sockets: binds.iter().filter_map(|bind| bind.socket.clone()).collect(),
        }
    }
}

/// Names the disks in place of the host's devices.
fn name_disks(spec: &mut Spec, disks: &[Disk]) {
    for (index, disk) in disks.iter().enumerate() {
        let DiskField::Mount(mount) = disk.field else { continue };
        let mounts = spec.mounts_mut().as_mut();
        if let Some(mount) = mounts.and_then(|mounts| mounts.get_mut(mount)) {
            mount.set_source(Some(disk::source_of(index)));
        }
    }
    disk::forget_others(spec, disks);
}

/// Adapts `spec` to the guest:
///
/// - The root file system and the sources of bind mounts are paths in the share, in the container's
///   folder.
/// - Processors are the guest's, from 0 on: as many as the container may use, at most `vcpus`.
/// - Namespaces of `joins` are those of containers in the same microVM.
/// - Mounts of `inner` become bind mounts of their own.
fn guest_spec(
    spec: &Spec,
    id: &str,
    binds: &[Bind],
    inner: &[Inner],
    vcpus: u8,
    joins: &[(LinuxNamespaceType, ContainerId)],
) -> Spec {
    let mut spec = spec.clone();
    let shared = Path::new(SHARED_DIR).join(id);
    let hooks = spec.hooks_mut().take().and_then(|hooks| guest_hooks(hooks, &shared));
    spec.set_hooks(hooks);
    if let Some(root) = spec.root_mut().as_mut() {
        root.set_path(shared.join("rootfs"));
    }
    if let Some(mounts) = spec.mounts_mut().as_mut() {
        for bind in binds {
            if let Some(mount) = mounts.get_mut(bind.mount) {
                let source = match (&bind.shm, &bind.socket) {
                    (Some(shm), _) => Path::new(SHM_DIR).join(&shm.key),
                    (None, Some(_)) => {
                        Path::new(HOST_SOCKETS_DIR).join(id).join(bind.mount.to_string())
                    }
                    (None, None) => shared.join(shared_name(bind)),
                };
                mount.set_source(Some(source));
                id_map::forget(mount);
            }
        }
        add_inner(mounts, inner, &shared);
    }
    // A namespace of the guest stands for each namespace of the host.
    let linux = spec.linux_mut().as_mut();
    for namespace in linux.and_then(|linux| linux.namespaces_mut().as_mut()).into_iter().flatten() {
        namespace.set_path(None);
        if let Some((_, container)) = joins.iter().find(|(kind, _)| *kind == namespace.typ()) {
            namespace.set_path(Some(format!("{JOIN_PREFIX}{container}").into()));
        }
    }
    let resources = spec.linux_mut().as_mut().and_then(|linux| linux.resources_mut().as_mut());
    if let Some(resources) = resources {
        guest_processors(resources, vcpus);
    }
    spec
}

/// A mount of the host inside the container's root or inside a bind mount's source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inner {
    /// The enclosing mount.
    pub of: InnerOf,
    /// Path relative to the enclosing mount. Empty for the mount that a bind mount's source itself
    /// lies on.
    pub path: PathBuf,
    /// Path in the share, relative to the container's folder.
    pub place: PathBuf,
    /// Options of the mount on the host, as far as a bind mount can have them.
    pub options: Vec<&'static str>,
}

/// The enclosing mount of an [`Inner`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InnerOf {
    /// The container's root.
    Root,
    /// The source of the bind mount at this position in `mounts`.
    Mount(usize),
}

/// Puts each inner mount behind its enclosing mount. Those of the root come before all others.
fn add_inner(mounts: &mut Vec<Mount>, inner: &[Inner], shared: &Path) {
    let bind = |destination: PathBuf, inner: &Inner, more: Vec<String>| {
        let own = ["bind"].iter().chain(&inner.options).map(|option| (*option).to_owned());
        let mut mount = Mount::default();
        mount
            .set_destination(destination)
            .set_typ(Some("bind".to_owned()))
            .set_source(Some(shared.join(&inner.place)))
            .set_options(Some(own.chain(more).collect()));
        mount
    };
    let of = |what: InnerOf| inner.iter().filter(move |inner| inner.of == what);
    let in_root =
        of(InnerOf::Root).map(|inner| bind(Path::new("/").join(&inner.path), inner, Vec::new()));
    let mut all: Vec<Mount> = in_root.collect();
    for (index, mut mount) in std::mem::take(mounts).into_iter().enumerate() {
        let own = InnerOf::Mount(index);
        for inner in of(own).filter(|inner| inner.path.as_os_str().is_empty()) {
            let options = mount.options_mut().get_or_insert_default();
            // In front: the last option wins, so those of config.json have precedence.
            options.splice(0..0, inner.options.iter().map(|option| (*option).to_owned()));
        }
        let destination = mount.destination().clone();
        let recursive: Vec<String> = mount_options::recursive(&mount).map(str::to_owned).collect();
        all.push(mount);
        for inner in of(own).filter(|inner| !inner.path.as_os_str().is_empty()) {
            all.push(bind(destination.join(&inner.path), inner, recursive.clone()));
        }
    }
    *mounts = all;
}

/// Replaces the host's processors in limits with those of the guest.
pub fn guest_processors(resources: &mut LinuxResources, vcpus: u8) {
    // A guest has one memory node, so it needs no list of nodes.
    if let Some(cpu) = resources.cpu_mut().as_mut() {
        if let Some(own) = cpu.cpus().as_deref().and_then(|list| guest_cpus(list, vcpus)) {
            cpu.set_cpus(Some(own));
        }
        cpu.set_mems(None);
    }
    if let Some(unified) = resources.unified_mut().as_mut() {
        unified.remove("cpuset.mems");
        if let Some(cpus) = unified.get_mut("cpuset.cpus")
            && let Some(own) = guest_cpus(cpus, vcpus)
        {
            *cpus = own;
        }
    }
}

/// A list of the guest's first processors: as many as `list` names, at most `vcpus`.
fn guest_cpus(list: &str, vcpus: u8) -> Option<String> {
    let last = cpu_list_len(list.trim())?.min(vcpus.into()).saturating_sub(1);
    Some(format!("0-{last}"))
}

/// The hooks that run in the guest, if there are any.
fn guest_hooks(mut hooks: Hooks, shared: &Path) -> Option<Hooks> {
    for (index, hook) in hooks.create_container_mut().iter_mut().flatten().enumerate() {
        if hook.args().as_ref().is_none_or(Vec::is_empty) {
            hook.set_args(Some(vec![hook.path().to_string_lossy().into_owned()]));
        }
        hook.set_path(shared.join(shared_hook(index)));
    }
    let mut guest = Hooks::default();
    guest.set_create_container(hooks.create_container_mut().take());
    guest.set_start_container(hooks.start_container_mut().take());
    let any = |hooks: &Option<Vec<Hook>>| hooks.as_ref().is_some_and(|hooks| !hooks.is_empty());
    let some = any(guest.create_container()) || any(guest.start_container());
    some.then_some(guest)
}

/// Path of the program of a createContainer hook, relative to the container's folder in the share.
pub(crate) fn shared_hook(index: usize) -> PathBuf {
    Path::new("hooks").join(index.to_string())
}

/// Path of a bind mount's source, relative to the container's folder in the share.
pub(crate) fn shared_name(bind: &Bind) -> PathBuf {
    in_mounts(bind.mount.to_string(), bind.directory)
}

/// Path of an inner mount by its number, relative to the container's folder in the share.
pub(crate) fn shared_inner(of: InnerOf, number: usize, directory: bool) -> PathBuf {
    match of {
        InnerOf::Root => in_mounts(format!("root.{number}"), directory),
        InnerOf::Mount(index) => in_mounts(format!("{index}.{number}"), directory),
    }
}

/// Path of a mount below `mounts`. A file lies in a directory of its own.
fn in_mounts(name: String, directory: bool) -> PathBuf {
    let path = Path::new("mounts").join(name);
    if directory { path } else { path.join("file") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::Propagation;

    #[test]
    fn only_the_root_and_bind_sources_move() {
        let spec: Spec = serde_json::from_str(
            r#"{"ociVersion":"1.0.2","root":{"path":"rootfs","readonly":true},"mounts":[
                {"destination":"/proc","type":"proc","source":"proc"},
                {"destination":"/data","type":"bind","source":"/srv/data","options":["rbind"]}]}"#,
        )
        .unwrap();
        let bind = Bind {
            mount: 1,
            source: "/srv/data".into(),
            directory: true,
            recursive: true,
            read_only: false,
            propagation: Propagation::Slave,
            id_map: None,
            shm: None,
            projected: None,
            socket: None,
        };
        let guest = guest_spec(&spec, "web", &[bind], &[], 1, &[]);
        let root = guest.root().as_ref().unwrap();
        assert_eq!(root.path(), Path::new("/run/isopod/shared/web/rootfs"));
        assert_eq!(root.readonly(), Some(true));
        let mounts = guest.mounts().as_ref().unwrap();
        assert_eq!(mounts[0].source().as_deref(), Some(Path::new("proc")));
        assert_eq!(
            mounts[1].source().as_deref(),
            Some(Path::new("/run/isopod/shared/web/mounts/1"))
        );
    }

    #[test]
    fn mounts_inside_of_others_follow_them() {
        let spec: Spec = serde_json::from_str(
            r#"{"ociVersion":"1.0.2","root":{"path":"rootfs"},"mounts":[
                {"destination":"/proc","type":"proc","source":"proc"},
                {"destination":"/data","type":"bind","source":"/srv","options":["rbind","rnoexec","exec","ro"]}]}"#,
        )
        .unwrap();
        let inner = |of, path: &str, place: &str, options: &[&'static str]| Inner {
            of,
            path: path.into(),
            place: place.into(),
            options: options.to_vec(),
        };
        let inner = [
            inner(InnerOf::Root, "opt", "mounts/root.0", &["nosuid"]),
            inner(InnerOf::Mount(1), "", "", &["noexec"]),
            inner(InnerOf::Mount(1), "a/b", "mounts/1.0", &["ro"]),
            inner(InnerOf::Mount(1), "f", "mounts/1.1/file", &[]),
        ];
        let guest = guest_spec(&spec, "web", &[], &inner, 1, &[]);
        let shown = guest.mounts().iter().flatten().map(|mount| {
            let options = mount.options().iter().flatten().map(String::as_str);
            let source = mount.source().as_ref().unwrap().display().to_string();
            let source = source.replace("/run/isopod/shared/web/mounts/", "");
            let options = options.collect::<Vec<_>>().join(",");
            format!("{source} {} {options}", mount.destination().display())
        });
        let expected = [
            "root.0 /opt bind,nosuid",
            "proc /proc ",
            "/srv /data noexec,rbind,rnoexec,exec,ro",
            "1.0 /data/a/b bind,ro,rnoexec",
            "1.1/file /data/f bind,rnoexec",
        ];
        assert_eq!(shown.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn namespaces_of_the_pod_are_those_of_its_containers() {
        let spec = r#"{"ociVersion":"1.0.2","linux":{"namespaces":[{"type":"pid"},
            {"type":"network","path":"/proc/7/ns/net"},{"type":"uts","path":"/proc/7/ns/uts"}]}}"#;
        let kinds = [LinuxNamespaceType::Network, LinuxNamespaceType::Uts];
        let joins = kinds.map(|kind| (kind, ContainerId::parse("pause").unwrap()));
        let guest = guest_spec(&serde_json::from_str(spec).unwrap(), "web", &[], &[], 1, &joins);
        let namespaces = guest.linux().as_ref().unwrap().namespaces().as_ref().unwrap();
        let paths = namespaces.iter().map(|n| n.path().as_ref().map(|path| path.to_str().unwrap()));
        let joined = Some("container:pause");
        assert_eq!(paths.collect::<Vec<_>>(), [None, joined, joined]);
    }

    #[test]
    fn processors_of_unified_limits_too() {
        let spec = r#"{"ociVersion":"1.0.2","linux":{"resources":{"unified":
            {"cpuset.cpus":"4-6","cpuset.mems":"0","memory.high":"1"}}}}"#;
        let guest = guest_spec(&serde_json::from_str(spec).unwrap(), "web", &[], &[], 2, &[]);
        let resources = guest.linux().as_ref().unwrap().resources().as_ref().unwrap();
        let unified = resources.unified().as_ref().unwrap();
        assert_eq!((unified["cpuset.cpus"].as_str(), unified.len()), ("0-1", 2));
    }

    #[test]
    fn only_hooks_of_the_guest_get_there() {
        let hooks = |json: &str| {
            let spec = format!(r#"{{"ociVersion":"1.0.2","hooks":{json}}}"#);
            guest_spec(&serde_json::from_str(&spec).unwrap(), "web", &[], &[], 1, &[])
                .hooks()
                .clone()
        };
        assert_eq!(hooks(r#"{"createRuntime":[{"path":"/x"}],"startContainer":[]}"#), None);
        let guest = hooks(
            r#"{"poststop":[{"path":"/x"}],"startContainer":[{"path":"/s"}],
                "createContainer":[{"path":"/a","args":["b"]},{"path":"/c","args":[]}]}"#,
        );
        let expected: Hooks = serde_json::from_str(
            r#"{"startContainer":[{"path":"/s"}],"createContainer":[
                {"path":"/run/isopod/shared/web/hooks/0","args":["b"]},
                {"path":"/run/isopod/shared/web/hooks/1","args":["/c"]}]}"#,
        )
        .unwrap();
        assert_eq!(guest, Some(expected));
    }

    #[test]
    fn processors_are_those_of_the_guest() {
        let cpus = |list: &str, vcpus: u8| {
            let spec = format!(
                r#"{{"ociVersion":"1.0.2","linux":{{"resources":{{"cpu":
                    {{"cpus":"{list}","mems":"0"}}}}}}}}"#
            );
            let guest =
                guest_spec(&serde_json::from_str(&spec).unwrap(), "web", &[], &[], vcpus, &[]);
            let resources = guest.linux().as_ref().unwrap().resources().as_ref().unwrap();
            let cpu = resources.cpu().as_ref().unwrap();
            assert_eq!(cpu.mems(), &None);
            cpu.cpus().clone().unwrap()
        };
        assert_eq!(cpus("2-3", 2), "0-1");
        assert_eq!(cpus("3", 1), "0-0");
        assert_eq!(cpus("0-3", 1), "0-0");
        assert_eq!(cpus("0,5", 4), "0-1");
        assert_eq!(cpus("", 4), "");
    }
}

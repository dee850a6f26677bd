//! config.json of a pod's holder, for a pod whose sandbox the shim has.
//!
//! With `sandboxer = "podsandbox"` containerd writes one for the pod's pause container. This is the
//! same for a container that executes nothing, so the checks of config.json hold for both.

use std::{collections::BTreeMap, path::Path};

use serde_json::{Value, json};

use crate::{
    bundle::{ANNOTATION_PREFIX, CONTAINERD_LIMITS, CONTAINERD_TYPE, HolderSpec},
    containerd::cri::{IDMapping, NamespaceMode, NamespaceOption, PodSandboxConfig, UserNamespace},
    error::{Error, Result},
};

/// `oom_score_adj` of a pause container, which holds for the holder too: the pod ends with it.
const OOM_SCORE_ADJ: i32 = -998;

/// First part of the name of a systemd scope, as containerd has it.
const SCOPE_PREFIX: &str = "cri-containerd";

/// Annotations about the pod, of containerd's plugin for Kubernetes.
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
const SANDBOX_NAME: &str = "io.kubernetes.cri.sandbox-name";
const SANDBOX_NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";
const SANDBOX_UID: &str = "io.kubernetes.cri.sandbox-uid";

/// Sysctls that containerd sets unless its configuration or the pod says otherwise: every port may
/// be bound, and every group may ping.
const LOW_PORTS: (&str, &str) = ("net.ipv4.ip_unprivileged_port_start", "0");
const PING: (&str, &str) = ("net.ipv4.ping_group_range", "0 2147483647");

/// The config.json of the holder of pod `id`, in the network namespace at `network` on the host.
///
/// # Errors
///
/// If the pod asks for a kind of namespace that is not known.
pub(super) fn pod_spec(
    id: &str,
    config: &PodSandboxConfig,
    hostname: &str,
    network: &str,
) -> Result<Value> {
    let linux = config.linux.get_or_default();
    let options = linux.security_context.get_or_default().namespace_options.get_or_default();
    let users = users(options)?;
    let mut sysctls: BTreeMap<&str, &str> =
        linux.sysctls.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    sysctls.entry(LOW_PORTS.0).or_insert(LOW_PORTS.1);
    if users.is_none() {
        // Groups of a user namespace need not reach so far.
        sysctls.entry(PING.0).or_insert(PING.1);
    }
    let mappings = |of: fn(&UserNamespace) -> &Vec<IDMapping>| {
        users.map(|users| of(users).iter().map(mapping).collect::<Vec<_>>())
    };
    let spec = HolderSpec {
        hostname: Some(hostname.to_owned()),
        oom_score_adj: Some(OOM_SCORE_ADJ),
        linux: json!({
            "cgroupsPath": cgroups_path(&linux.cgroup_parent, id),
            "namespaces": namespaces(options, network, users.is_some()),
            "sysctl": sysctls,
            "uidMappings": mappings(|users| &users.uids),
            "gidMappings": mappings(|users| &users.gids),
        }),
        annotations: annotations(id, config),
    };
    Ok(spec.json())
}

/// The namespaces of the pod. The checks of config.json refuse by name what is the host's.
fn namespaces(options: &NamespaceOption, network: &str, with_users: bool) -> Vec<Value> {
    let of_host = |mode: NamespaceMode| mode == NamespaceMode::NODE;
    let mut all = vec![json!({ "type": "mount" })];
    if !of_host(options.network.enum_value_or_default()) {
        all.push(json!({ "type": "uts" }));
        all.push(match network {
            "" => json!({ "type": "network" }),
            path => json!({ "type": "network", "path": path }),
        });
    }
    if !of_host(options.pid.enum_value_or_default()) {
        all.push(json!({ "type": "pid" }));
    }
    if !of_host(options.ipc.enum_value_or_default()) {
        all.push(json!({ "type": "ipc" }));
    }
    if with_users {
        all.push(json!({ "type": "user" }));
    }
    all
}

/// The user namespace of the pod, if it has one.
fn users(options: &NamespaceOption) -> Result<Option<&UserNamespace>> {
    let Some(users) = options.userns_options.as_ref() else { return Ok(None) };
    match users.mode.enum_value() {
        Ok(NamespaceMode::POD) => Ok(Some(users)),
        Ok(NamespaceMode::NODE) => Ok(None),
        Ok(NamespaceMode::CONTAINER | NamespaceMode::TARGET) | Err(_) => {
            let mode = users.mode.value();
            Err(Error::new(format!("the user namespace of the pod has mode {mode}: use 0 or 2")))
        }
    }
}

fn mapping(mapping: &IDMapping) -> Value {
    let IDMapping { host_id, container_id, length, .. } = mapping;
    json!({ "containerID": container_id, "hostID": host_id, "size": length })
}

/// The holder's cgroup in that of the pod, as containerd names that of a container.
fn cgroups_path(parent: &str, id: &str) -> Option<String> {
    if parent.is_empty() {
        return None;
    }
    let last = Path::new(parent).file_name().and_then(|name| name.to_str()).unwrap_or_default();
    Some(match last.ends_with(".slice") {
        true => format!("{last}:{SCOPE_PREFIX}:{id}"),
        false => Path::new(parent).join(id).to_string_lossy().into_owned(),
    })
}

fn annotations(id: &str, config: &PodSandboxConfig) -> Value {
    let own = config.annotations.iter().filter(|(key, _)| key.starts_with(ANNOTATION_PREFIX));
    let mut all: BTreeMap<String, String> =
        own.map(|(key, value)| (key.clone(), value.clone())).collect();
    let mut add = |key: &str, value: &str| all.insert(key.to_owned(), value.to_owned());
    add(CONTAINERD_TYPE, "sandbox");
    add(SANDBOX_ID, id);
    let metadata = config.metadata.get_or_default();
    add(SANDBOX_NAME, &metadata.name);
    add(SANDBOX_NAMESPACE, &metadata.namespace);
    add(SANDBOX_UID, &metadata.uid);
    if let Some(limits) = config.linux.get_or_default().resources.as_ref() {
        for (name, value) in [
            ("cpu-period", limits.cpu_period),
            ("cpu-quota", limits.cpu_quota),
            ("cpu-shares", limits.cpu_shares),
            ("memory", limits.memory_limit_in_bytes),
        ] {
            add(&format!("{CONTAINERD_LIMITS}{name}"), &value.to_string());
        }
    }
    json!(all)
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::protobuf::MessageField;

    use super::*;
    use crate::{bundle::Bundle, containerd::cri};

    fn config(options: NamespaceOption) -> PodSandboxConfig {
        let mut config = PodSandboxConfig::default();
        let linux = config.linux.mut_or_insert_default();
        linux.security_context.mut_or_insert_default().namespace_options =
            MessageField::some(options);
        config
    }

    fn load(config: &PodSandboxConfig) -> Result<Bundle> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("rootfs")).unwrap();
        let spec = pod_spec("p", config, "web", "").unwrap();
        std::fs::write(dir.path().join("config.json"), spec.to_string()).unwrap();
        Bundle::load(dir.path(), None)
    }

    #[test]
    fn a_pod_is_a_bundle_that_passes_every_check() {
        let mut config = config(NamespaceOption::default());
        let linux = config.linux.mut_or_insert_default();
        linux.cgroup_parent = "/kubepods/pod1".into();
        linux.sysctls.insert("net.ipv4.ip_unprivileged_port_start".into(), "80".into());
        let limits = linux.resources.mut_or_insert_default();
        (limits.cpu_period, limits.cpu_quota) = (100_000, 250_000);
        config.annotations.insert("dev.isopod.nics".into(), "3".into());
        config.annotations.insert("com.example.x".into(), "y".into());
        let bundle = load(&config).unwrap();
        assert_eq!((bundle.vm.vcpus.min(3), bundle.nics), (bundle.vm.vcpus, Some(3)));
        let linux = bundle.spec.linux().as_ref().unwrap();
        assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/kubepods/pod1/p")));
        let sysctls = linux.sysctl().as_ref().unwrap();
        assert_eq!((sysctls[LOW_PORTS.0].as_str(), sysctls[PING.0].as_str()), ("80", PING.1));
        let annotations = bundle.spec.annotations().as_ref().unwrap();
        assert!(!annotations.contains_key("com.example.x"));
        assert_eq!(annotations[SANDBOX_ID], "p");
        // Nobody gave a configuration.
        load(&cri::decode(None).unwrap()).unwrap();
    }

    #[test]
    fn namespaces_of_the_host_are_refused_by_name() {
        let node = || NamespaceMode::NODE.into();
        let none = NamespaceOption::default;
        for (options, field) in [
            (NamespaceOption { network: node(), ..none() }, "hostNetwork"),
            (NamespaceOption { pid: node(), ..none() }, "hostPID"),
            (NamespaceOption { ipc: node(), ..none() }, "hostIPC"),
        ] {
            let error = load(&config(options)).unwrap_err();
            assert!(error.message.contains(field), "{error}");
        }
    }

    #[test]
    fn a_user_namespace_is_that_of_the_pod() {
        let ids = IDMapping { host_id: 100_000, length: 65536, ..IDMapping::default() };
        let users = |mode: NamespaceMode| {
            let (uids, gids) = (vec![ids.clone()], vec![ids.clone()]);
            let users = UserNamespace { mode: mode.into(), uids, gids, ..UserNamespace::default() };
            let userns_options = MessageField::some(users);
            config(NamespaceOption { userns_options, ..NamespaceOption::default() })
        };
        let bundle = load(&users(NamespaceMode::POD)).unwrap();
        let linux = bundle.spec.linux().as_ref().unwrap();
        assert_eq!(linux.uid_mappings().as_ref().unwrap()[0].host_id(), 100_000);
        assert!(!linux.sysctl().as_ref().unwrap().contains_key(PING.0));
        let bundle = load(&users(NamespaceMode::NODE)).unwrap();
        assert!(bundle.spec.linux().as_ref().unwrap().uid_mappings().is_none());
        let error = pod_spec("p", &users(NamespaceMode::TARGET), "web", "").unwrap_err();
        assert!(error.message.contains("mode 3"), "{error}");
    }

    #[test]
    fn cgroups_have_their_names_of_containerd() {
        let of = |parent: &str| cgroups_path(parent, "p").unwrap_or_default();
        assert_eq!(of(""), "");
        assert_eq!(of("/kubepods/pod1"), "/kubepods/pod1/p");
        assert_eq!(
            of("/kubepods.slice/kubepods-pod1.slice"),
            "kubepods-pod1.slice:cri-containerd:p"
        );
    }
}

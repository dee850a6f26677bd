//! Supported parts of the runtime specification for `isopod features`, in the structure of the
//! specification's features.md.
//!
//! The lists come from the code that decides: a refused value is not in them.

use std::collections::HashMap;

use oci_spec::runtime::{
    Apparmor, Cgroup, Features, IDMap, IntelRdt, LinuxFeature, LinuxIdMappingBuilder,
    LinuxNamespaceBuilder, LinuxNamespaceType, MemoryPolicy, MountExtensions, NetDevices, Selinux,
};
use serde_json::json;

use isopod_protocol::capability;

use super::{
    annotations::ANNOTATIONS, check, default::default_spec, mount_options,
    oci_spec_quirks::SPEC_VERSION, pod, refused_fields, seccomp,
};

/// The oldest version of the specification whose config.json is understood.
const OLDEST_SPEC_VERSION: &str = "1.0.0";

/// All hooks of the specification.
const HOOKS: [&str; 6] =
    ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

/// All namespaces of the specification.
const NAMESPACES: [LinuxNamespaceType; 8] = [
    LinuxNamespaceType::Cgroup,
    LinuxNamespaceType::Ipc,
    LinuxNamespaceType::Mount,
    LinuxNamespaceType::Network,
    LinuxNamespaceType::Pid,
    LinuxNamespaceType::Time,
    LinuxNamespaceType::User,
    LinuxNamespaceType::Uts,
];

/// The features structure of the specification. A feature that is not in it is not supported.
pub fn features() -> Features {
    let mut features = Features::default();
    features
        .set_oci_version_min(OLDEST_SPEC_VERSION.to_owned())
        .set_oci_version_max(SPEC_VERSION.to_owned())
        .set_hooks(Some(HOOKS.into_iter().filter(|hook| runs(hook)).map(str::to_owned).collect()))
        .set_mount_options(Some(mount_options::known()))
        .set_linux(Some(linux()))
        .set_annotations(Some(HashMap::from([
            ("dev.isopod.version".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
            // runc uses the same key.
            ("io.github.seccomp.libseccomp.version".to_owned(), seccomp::library_version()),
        ])))
        .set_potentially_unsafe_config_annotations(Some(
            ANNOTATIONS.into_iter().chain(pod::CONTAINER_TYPES).map(str::to_owned).collect(),
        ));
    features
}

fn runs(hook: &str) -> bool {
    refused_fields::refuse(&json!({"hooks": {hook: [{"path": "/hook"}]}})).is_ok()
}

fn linux() -> LinuxFeature {
    let namespaces = NAMESPACES.into_iter().filter(|kind| can_be_made(*kind)).collect();
    let capabilities = capability::NAMES.iter().map(|name| format!("CAP_{name}")).collect();
    let mut cgroup = Cgroup::default();
    cgroup
        .set_v1(Some(false))
        .set_v2(Some(true))
        .set_systemd(Some(true))
        .set_systemd_user(Some(false))
        .set_rdma(Some(false));
    let mut memory_policy = MemoryPolicy::default();
    memory_policy.set_modes(Some(Vec::new())).set_flags(Some(Vec::new()));
    let mut apparmor = Apparmor::default();
    apparmor.set_enabled(Some(false));
    let mut selinux = Selinux::default();
    selinux.set_enabled(Some(false));
    let mut intel_rdt = IntelRdt::default();
    intel_rdt.set_enabled(Some(false));
    let mut idmap = IDMap::default();
    idmap.set_enabled(Some(true));
    let mut mount_extensions = MountExtensions::default();
    mount_extensions.set_idmap(Some(idmap));
    let mut net_devices = NetDevices::default();
    net_devices.set_enabled(Some(false));
    let mut linux = LinuxFeature::default();
    linux
        .set_namespaces(Some(namespaces))
        .set_capabilities(Some(capabilities))
        .set_cgroup(Some(cgroup))
        .set_seccomp(Some(seccomp::features()))
        .set_apparmor(Some(apparmor))
        .set_selinux(Some(selinux))
        .set_intel_rdt(Some(intel_rdt))
        .set_memory_policy(Some(memory_policy))
        .set_mount_extensions(Some(mount_extensions))
        .set_net_devices(Some(net_devices));
    linux
}

/// Tells whether a container can have a namespace of this kind of its own.
fn can_be_made(kind: LinuxNamespaceType) -> bool {
    let mut spec = default_spec();
    let Some(linux) = spec.linux_mut().as_mut() else { return false };
    let namespaces = linux.namespaces_mut().get_or_insert_default();
    if !namespaces.iter().any(|namespace| namespace.typ() == kind) {
        namespaces.extend(LinuxNamespaceBuilder::default().typ(kind).build());
    }
    if kind == LinuxNamespaceType::User {
        let all = LinuxIdMappingBuilder::default().host_id(0_u32).container_id(0_u32).size(1_u32);
        let mappings: Vec<_> = all.build().into_iter().collect();
        linux.set_uid_mappings(Some(mappings.clone())).set_gid_mappings(Some(mappings));
    }
    check::spec(&spec).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_follow_what_is_refused() {
        let features = features();
        let hooks = features.hooks().as_ref().unwrap();
        assert!(hooks.contains(&"prestart".to_owned()) && hooks.contains(&"poststop".to_owned()));
        let linux = features.linux().as_ref().unwrap();
        let namespaces = linux.namespaces().as_ref().unwrap();
        for kind in [LinuxNamespaceType::Pid, LinuxNamespaceType::User, LinuxNamespaceType::Network]
        {
            assert!(namespaces.contains(&kind), "{kind:?}");
        }
        let capabilities = linux.capabilities().as_ref().unwrap();
        assert_eq!((capabilities.len(), &*capabilities[0]), (41, "CAP_CHOWN"));
        let options = features.mount_options().as_ref().unwrap();
        for option in ["ro", "rro", "rbind", "rslave", "tmpcopyup", "noexec", "idmap"] {
            assert!(options.contains(&option.to_owned()), "{option}");
        }
        for option in ["", "mand", "remount"] {
            assert!(!options.contains(&option.to_owned()), "{option}");
        }
        let seccomp = linux.seccomp().as_ref().unwrap();
        let actions = serde_json::to_value(seccomp.actions()).unwrap();
        assert!(actions.as_array().unwrap().contains(&json!("SCMP_ACT_ERRNO")), "{actions}");
        assert!(!actions.as_array().unwrap().contains(&json!("SCMP_ACT_NOTIFY")), "{actions}");
        let flags = seccomp.supported_flags().as_ref().unwrap();
        assert_eq!(flags.len() + 1, seccomp.known_flags().as_ref().unwrap().len());
    }
}

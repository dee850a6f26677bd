//! `features`, read as its callers read it, and compared with the runtime's behaviour.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use isopod_tests::{Scope, microvm_only};
use serde::Deserialize;
use serde_json::{Value, json};

/// The features structure of the specification: the fields that engines read.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Features {
    oci_version_min: String,
    oci_version_max: String,
    hooks: Vec<String>,
    mount_options: Vec<String>,
    linux: Linux,
    annotations: std::collections::HashMap<String, String>,
    potentially_unsafe_config_annotations: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Linux {
    namespaces: Vec<String>,
    capabilities: Vec<String>,
    cgroup: Cgroup,
    seccomp: Seccomp,
    apparmor: Enabled,
    selinux: Enabled,
    intel_rdt: Enabled,
    mount_extensions: MountExtensions,
    net_devices: Enabled,
}

#[derive(Debug, Deserialize)]
struct Cgroup {
    v1: bool,
    v2: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Seccomp {
    enabled: bool,
    actions: Vec<String>,
    operators: Vec<String>,
    archs: Vec<String>,
    known_flags: Vec<String>,
    supported_flags: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Enabled {
    enabled: bool,
}

#[derive(Debug, Deserialize)]
struct MountExtensions {
    idmap: Enabled,
}

fn features(scope: &Scope) -> Features {
    let out = scope.runtime().args(["features"]).output().ok();
    serde_json::from_str(&out.stdout).unwrap_or_else(|e| panic!("{e}: {out}"))
}

#[test]
fn features_have_the_specifications_form() {
    microvm_only!();
    let seen = features(&Scope::new());
    for version in [&seen.oci_version_min, &seen.oci_version_max] {
        assert!(version.starts_with("1.") && version.split('.').count() == 3, "{version}");
    }
    let linux = &seen.linux;
    assert!(linux.cgroup.v2 && !linux.cgroup.v1);
    assert!(linux.seccomp.enabled && linux.seccomp.operators.len() == 7);
    assert!(linux.seccomp.archs.contains(&"SCMP_ARCH_X86_64".to_owned()), "{linux:?}");
    assert!(linux.seccomp.actions.contains(&"SCMP_ACT_ERRNO".to_owned()), "{linux:?}");
    for flag in &linux.seccomp.supported_flags {
        assert!(linux.seccomp.known_flags.contains(flag), "{flag}");
    }
    for not in [&linux.apparmor, &linux.selinux, &linux.intel_rdt, &linux.net_devices] {
        assert!(!not.enabled, "{linux:?}");
    }
    assert!(linux.mount_extensions.idmap.enabled);
    assert!(seen.annotations.contains_key("dev.isopod.version"), "{seen:?}");
    let unsafe_ones = &seen.potentially_unsafe_config_annotations;
    assert!(unsafe_ones.contains(&"dev.isopod.memory_mib".to_owned()), "{seen:?}");
}

#[test]
fn what_it_promises_is_kept() {
    microvm_only!();
    let scope = Scope::new();
    let seen = features(&scope);
    let container = scope.container().args(["true"]).edit(|c| {
        // All but the user namespace, which needs set-up of its own.
        let kinds = seen.linux.namespaces.iter().filter(|kind| *kind != "user");
        c["linux"]["namespaces"] = kinds.map(|kind| json!({ "type": kind })).collect();
        let all = json!(seen.linux.capabilities);
        c["process"]["capabilities"] =
            json!({ "bounding": all, "permitted": all, "effective": all, "inheritable": all });
        // A static program, on the host as in the container.
        let hooks: Value = seen
            .hooks
            .iter()
            .map(|hook| (hook.clone(), json!([{ "path": "/bin/busybox", "args": ["true"] }])))
            .collect::<serde_json::Map<_, _>>()
            .into();
        c["hooks"] = hooks;
        c["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": seen.linux.seccomp.archs,
            "flags": seen.linux.seccomp.supported_flags,
            "syscalls": [{ "names": ["swapon"], "action": "SCMP_ACT_ERRNO" }],
        });
    });
    container.run().ok();
    // The options of a bind mount, except those that share it with the host.
    let data = scope.dir().join("data");
    std::fs::create_dir(&data).unwrap();
    for option in &seen.mount_options {
        if option == "tmpcopyup" || option.ends_with("shared") {
            continue;
        }
        let check = scope.container().args(["true"]);
        let check = check.mount("/tmp", "bind", data.to_str().unwrap(), &["bind", option]);
        let check = check.edit(|c| {
            if option.ends_with("idmap") {
                let mount = c["mounts"].as_array_mut().unwrap().last_mut().unwrap();
                let all = json!([{ "containerID": 0, "hostID": 0, "size": 1 }]);
                (mount["uidMappings"], mount["gidMappings"]) = (all.clone(), all);
            }
        });
        // An unknown option is refused before anything is made. A known one fails for the missing
        // file.
        let check = check.mount("/etc", "bind", "/no/such/file", &["bind"]);
        let out = check.run();
        assert!(out.stderr.contains("/no/such/file"), "{option}: {out}");
    }
}

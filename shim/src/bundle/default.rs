//! The default specification: the config.json of `runc spec`, and the base of the config.json for
//! an image.

use std::{collections::HashSet, fs, io::Write, os::unix::fs::OpenOptionsExt, path::Path};

use oci_spec::runtime::{
    Capability, LinuxCapabilities, LinuxDeviceCgroup, LinuxIdMappingBuilder, LinuxNamespace,
    LinuxNamespaceType, LinuxResources, Mount, Process, Root, Spec,
};
use serde::Serialize;
use serde_json::{Value, ser::PrettyFormatter};

use crate::{
    bundle::oci_spec_quirks::SPEC_VERSION,
    error::{Explain, Result},
};

/// The name of the default container's host.
const HOSTNAME: &str = "isopod";

/// Capabilities of the default container's process.
const CAPABILITIES: [Capability; 3] =
    [Capability::AuditWrite, Capability::Kill, Capability::NetBindService];

/// A shell on a terminal, in namespaces of its own, on the read-only root file system `rootfs`
/// beside config.json.
pub fn default_spec() -> Spec {
    // The defaults of `oci-spec` are those of `runc spec`, except for the fields that are set here.
    let mut spec = Spec::default();
    spec.set_version(SPEC_VERSION.to_owned());
    spec.set_hostname(Some(HOSTNAME.to_owned()));
    spec.set_annotations(None);
    spec.set_root(Some(Root::default()));
    let mut process = Process::default();
    process.set_terminal(Some(true));
    process.set_args(Some(vec!["sh".to_owned()]));
    process.set_capabilities(Some(capabilities(&CAPABILITIES)));
    spec.set_process(Some(process));
    if let Some(linux) = spec.linux_mut() {
        let mut deny = LinuxDeviceCgroup::default();
        deny.set_access(Some("rwm".to_owned()));
        let mut resources = LinuxResources::default();
        resources.set_devices(Some(vec![deny]));
        linux.set_resources(Some(resources));
    }
    spec
}

/// [`default_spec`] for a user who is not root. `uid` and `gid` are the host's ids of the user
/// namespace's root. There are no network namespace and no limits, because such a user cannot set
/// them up. /sys is the host's.
pub fn rootless_spec(uid: u32, gid: u32) -> Spec {
    let mut spec = default_spec();
    for mount in spec.mounts_mut().iter_mut().flatten() {
        if mount.destination() == Path::new("/sys") {
            *mount = host_sys();
        } else if let Some(options) = mount.options_mut() {
            // The user namespace maps a single id, so it has none of these.
            options.retain(|option| !option.starts_with("gid=") && !option.starts_with("uid="));
        }
    }
    if let Some(linux) = spec.linux_mut() {
        let root = |outside: u32| {
            let mapping = LinuxIdMappingBuilder::default().container_id(0_u32).host_id(outside);
            // All members are set, so the build succeeds.
            Some(mapping.size(1_u32).build().into_iter().collect::<Vec<_>>())
        };
        linux.set_uid_mappings(root(uid)).set_gid_mappings(root(gid)).set_resources(None);
        let namespaces = linux.namespaces_mut().get_or_insert_default();
        namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Network);
        let mut user = LinuxNamespace::default();
        user.set_typ(LinuxNamespaceType::User);
        namespaces.push(user);
    }
    spec
}

/// A bind mount of the host's /sys. The kernel refuses a mount of sysfs in a user namespace without
/// a network namespace of its own.
fn host_sys() -> Mount {
    let options = ["rbind", "nosuid", "noexec", "nodev", "ro"];
    let mut mount = Mount::default();
    mount
        .set_destination("/sys".into())
        .set_typ(Some("none".to_owned()))
        .set_source(Some("/sys".into()))
        .set_options(Some(options.map(str::to_owned).to_vec()));
    mount
}

/// The capability sets of a process with the capabilities `names`. No capability is inheritable,
/// for it would outlive a change of user. So none is ambient either: the kernel makes only
/// inheritable capabilities ambient.
pub fn capabilities(names: &[Capability]) -> LinuxCapabilities {
    let set: HashSet<Capability> = names.iter().copied().collect();
    let mut capabilities = LinuxCapabilities::default();
    capabilities.set_bounding(Some(set.clone()));
    capabilities.set_effective(Some(set.clone()));
    capabilities.set_permitted(Some(set));
    capabilities.set_inheritable(None);
    capabilities.set_ambient(None);
    capabilities
}

/// Writes `spec` to the new file `path`: the same text for the same specification. An existing file
/// is an error.
pub fn write_spec(path: &Path, spec: &Spec) -> Result<()> {
    let what = || format!("cannot write {}", path.display());
    let text = spec_text(spec).explain(what)?;
    let mut file =
        fs::OpenOptions::new().write(true).create_new(true).mode(0o666).open(path).explain(what)?;
    file.write_all(&text).explain(what)
}

/// The JSON text of `spec`, with tabs as runc writes it. Members and capabilities are sorted,
/// because the types keep annotations and capabilities in an order that differs from run to run.
fn spec_text(spec: &Spec) -> serde_json::Result<Vec<u8>> {
    let mut json = serde_json::to_value(spec)?;
    let sets = json.pointer_mut("/process/capabilities").and_then(Value::as_object_mut);
    for set in sets.into_iter().flat_map(|sets| sets.values_mut()) {
        if let Some(names) = set.as_array_mut() {
            names.sort_by(|one, other| one.as_str().cmp(&other.as_str()));
        }
    }
    let mut text = Vec::new();
    let format = PrettyFormatter::with_indent(b"\t");
    json.serialize(&mut serde_json::Serializer::with_formatter(&mut text, format))?;
    text.push(b'\n');
    Ok(text)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::bundle::Bundle;

    #[test]
    fn differs_from_what_runc_writes_only_where_meant() {
        let text = spec_text(&default_spec()).unwrap();
        assert!(text.starts_with(b"{\n\t\""), "not indented");
        assert_as_runcs(&text, include_str!("testdata/runc-spec.json"), None);
        let text = spec_text(&rootless_spec(1000, 100)).unwrap();
        assert_as_runcs(&text, include_str!("testdata/runc-spec-rootless.json"), Some((1000, 100)));
    }

    #[track_caller]
    fn assert_as_runcs(text: &[u8], runc: &str, user: Option<(u32, u32)>) {
        let mut expected: Value = serde_json::from_str(runc).unwrap();
        expected["ociVersion"] = json!(SPEC_VERSION);
        expected["hostname"] = json!(HOSTNAME);
        expected["process"]["capabilities"].as_object_mut().unwrap().remove("ambient");
        // runc writes this namespace on a host with cgroup v2, and the guest has cgroup v2.
        let cgroup = json!({ "type": "cgroup" });
        let namespaces = expected["linux"]["namespaces"].as_array_mut().unwrap();
        let user_namespace = namespaces.iter().position(|n| n["type"] == "user");
        namespaces.insert(user_namespace.unwrap_or(namespaces.len()), cgroup);
        if let Some((uid, gid)) = user {
            // The caller of runc was root, so runc's file has root's ids.
            expected["linux"]["uidMappings"][0]["hostID"] = json!(uid);
            expected["linux"]["gidMappings"][0]["hostID"] = json!(gid);
        }
        assert_eq!(serde_json::from_slice::<Value>(text).unwrap(), expected);
    }

    #[test]
    fn is_a_bundle_with_a_root_file_system() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("rootfs")).unwrap();
        let path = dir.path().join("config.json");
        write_spec(&path, &default_spec()).unwrap();
        let bundle = Bundle::load(dir.path(), None).unwrap();
        assert_eq!(bundle.spec, default_spec());
        let again = write_spec(&path, &default_spec()).unwrap_err().message;
        assert!(again.contains("config.json") && again.contains("exists"), "{again}");
    }
}

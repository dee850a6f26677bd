//! Corrections of config.json where the types of the `oci-spec` crate do not take its words.

use oci_spec::runtime::Capability;
use serde_json::{Map, Value};

/// Version of the OCI runtime specification that this runtime follows.
pub const SPEC_VERSION: &str = "1.2.0";

/// The sets of `process.capabilities`.
const SETS: [&str; 5] = ["bounding", "effective", "inheritable", "permitted", "ambient"];

/// Flags of `process.scheduler`: the specification's spelling, and the spelling of the types.
const SCHEDULER_FLAGS: [(&str, &str); 2] = [
    ("SCHED_FLAG_RESET_ON_FORK", "SCHED_RESET_ON_FORK"),
    ("SCHED_FLAG_DL_OVERRUN", "SCHED_FLAG_D_L_OVERRUN"),
];

/// Makes the value for a member that is null or missing.
type Make = fn() -> Value;

/// Objects whose members the document names. A null member gets the zero value of its type.
const MAPS: [(&str, Make); 6] = [
    ("/annotations", || "".into()),
    ("/linux/sysctl", || "".into()),
    ("/linux/resources/unified", || "".into()),
    ("/linux/resources/rdma", || Value::Object(Map::new())),
    ("/linux/netDevices", || Value::Object(Map::new())),
    ("/linux/timeOffsets", || Value::Object(Map::new())),
];

/// Members that the types demand, with runc's values for missing ones. A `*` stands for each item
/// of a list. The other members that the types demand name a kind of object. runc has no object
/// without a kind either.
const DEFAULTS: [(&str, &str, Make); 7] = [
    ("", "ociVersion", || SPEC_VERSION.into()),
    ("/process", "user", || Value::Object(Map::new())),
    ("/process", "cwd", || "".into()),
    ("/mounts/*", "destination", || "".into()),
    ("/linux/seccomp/syscalls/*", "names", || Value::Array(Vec::new())),
    ("/linux/seccomp/syscalls/*/args/*", "index", || 0.into()),
    ("/linux/seccomp/syscalls/*/args/*", "value", || 0.into()),
];

/// Makes the types accept a config.json. Callers written in Go write null for an absent member, and
/// leave out a member with the zero value of its type.
pub(super) fn correct(config: &mut Value) {
    for (map, absent) in MAPS {
        let members = config.pointer_mut(map).and_then(Value::as_object_mut);
        for value in members.into_iter().flat_map(|members| members.values_mut()) {
            if value.is_null() {
                *value = absent();
            }
        }
    }
    remove_nulls(config);
    let linux = config.get_mut("linux").and_then(Value::as_object_mut);
    if let Some(linux) = linux.filter(|linux| linux.get("seccomp").is_some_and(says_nothing)) {
        linux.remove("seccomp");
    }
    for (place, member, value) in DEFAULTS {
        for object in objects(config, place) {
            object.entry(member).or_insert_with(value);
        }
    }
    if let Some(process) = config.get_mut("process") {
        words(process);
    }
}

/// [`correct`] for a `process` object by itself.
pub(super) fn correct_process(process: &mut Value) {
    let mut config = serde_json::json!({ "process": process.take() });
    correct(&mut config);
    *process = config["process"].take();
}

/// [`correct`] for a `linux.resources` object by itself.
pub(super) fn correct_resources(resources: &mut Value) {
    let mut config = serde_json::json!({ "linux": { "resources": resources.take() } });
    correct(&mut config);
    *resources = config["linux"]["resources"].take();
}

/// Tells whether `linux.seccomp` has no action, no system calls and no listener. To runc it is no
/// filter then.
fn says_nothing(seccomp: &Value) -> bool {
    let Some(seccomp) = seccomp.as_object() else { return false };
    let action = seccomp.get("defaultAction").is_none_or(|action| action == "");
    let calls =
        seccomp.get("syscalls").and_then(Value::as_array).is_some_and(|all| !all.is_empty());
    action && !calls && seccomp.keys().all(|key| !key.starts_with("listener"))
}

fn remove_nulls(value: &mut Value) {
    match value {
        Value::Object(members) => {
            members.retain(|_, member| !member.is_null());
            members.values_mut().for_each(remove_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(remove_nulls),
        _ => {}
    }
}

/// The objects at a path of [`DEFAULTS`].
fn objects<'a>(value: &'a mut Value, place: &str) -> Vec<&'a mut Map<String, Value>> {
    match place.strip_prefix('/').map(|rest| rest.split_once('/').unwrap_or((rest, ""))) {
        None => value.as_object_mut().into_iter().collect(),
        Some((part, rest)) => {
            let rest = if rest.is_empty() { String::new() } else { format!("/{rest}") };
            match value {
                Value::Array(items) if part == "*" => {
                    items.iter_mut().flat_map(|item| objects(item, &rest)).collect()
                }
                Value::Object(members) => {
                    members.get_mut(part).map(|member| objects(member, &rest)).unwrap_or_default()
                }
                _ => Vec::new(),
            }
        }
    }
}

/// Replaces the words of a `process` object with those of the types. Unknown capabilities are left
/// out with a warning, as runc does, because newer kernels have more of them.
fn words(process: &mut Value) {
    let mut unknown = Vec::new();
    for set in SETS {
        let pointer = format!("/capabilities/{set}");
        let Some(Value::Array(names)) = process.pointer_mut(&pointer) else { continue };
        names.retain(|name| {
            // The types refuse a name that is no string.
            let known =
                !name.is_string() || serde_json::from_value::<Capability>(name.clone()).is_ok();
            if !known && !unknown.contains(name) {
                unknown.push(name.clone());
            }
            known
        });
    }
    if !unknown.is_empty() {
        let names: Vec<String> = unknown.iter().map(Value::to_string).collect();
        log::warn!(
            "process.capabilities has unknown names, which are left out: {}",
            names.join(", ")
        );
    }
    if let Some(Value::Array(flags)) = process.pointer_mut("/scheduler/flags") {
        for flag in flags {
            if let Some((_, types)) = SCHEDULER_FLAGS.iter().find(|(spec, _)| flag == spec) {
                *flag = (*types).into();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::Process;
    use serde_json::json;

    #[test]
    fn what_the_types_do_not_take_is_corrected() {
        let mut process = json!({
            "user": {"uid": 0, "gid": 0}, "cwd": "/",
            "capabilities": {"bounding": ["CAP_KILL", "CAP_FLY"], "ambient": ["CAP_FLY"]},
            "scheduler": {
                "policy": "SCHED_DEADLINE",
                "flags": ["SCHED_FLAG_RESET_ON_FORK", "SCHED_FLAG_DL_OVERRUN", "SCHED_FLAG_RECLAIM"]
            }
        });
        correct_process(&mut process);
        let capabilities = json!({"bounding": ["CAP_KILL"], "ambient": []});
        assert_eq!(process["capabilities"], capabilities);
        serde_json::from_value::<Process>(process).unwrap();
    }

    #[test]
    fn what_runcs_types_default_may_be_null_or_missing() {
        use crate::bundle::tests::fields;
        use oci_spec::runtime::Spec;
        // Without these members there is no object, and runc refuses it too.
        let named = ["type", "defaultAction", "action", "op", "mode", "path", "domain", "policy"];
        // These fields are refused, whatever they say.
        let other = |path: &str| ["vm", "windows"].iter().any(|root| path.starts_with(root));
        let whole: Map<String, Value> = fields::of::<Spec>()
            .into_iter()
            .filter(|(path, _)| !path.contains(['.', '[']))
            .collect();
        for path in fields::of::<Spec>().keys().filter(|path| !path.ends_with(['*', ']'])) {
            let (parent, member) = path.rsplit_once('.').unwrap_or(("", path));
            if named.contains(&member) || other(path) {
                continue;
            }
            for null in [true, false] {
                let mut config = Value::Object(whole.clone());
                let pointer = format!("/{}", parent.replace("[]", ".0").replace('.', "/"));
                let pointer = if parent.is_empty() { "" } else { pointer.as_str() };
                let object = config.pointer_mut(pointer).unwrap().as_object_mut().unwrap();
                match null {
                    true => drop(object.insert(member.to_owned(), Value::Null)),
                    false => drop(object.remove(member)),
                }
                correct(&mut config);
                if let Err(error) = serde_json::from_value::<Spec>(config) {
                    panic!("{path}: {error}");
                }
            }
        }
    }

    #[test]
    fn a_filter_that_says_nothing_is_none() {
        for (seccomp, stays) in [
            (json!({}), false),
            (json!({"defaultAction": "", "architectures": ["SCMP_ARCH_X86_64"]}), false),
            (json!({"syscalls": null}), false),
            (json!({"defaultAction": "SCMP_ACT_ALLOW"}), true),
            (json!({"syscalls": [{"names": ["x"], "action": "SCMP_ACT_ERRNO"}]}), true),
            (json!({"listenerPath": "/x"}), true),
        ] {
            let mut config = json!({"linux": {"seccomp": seccomp}});
            correct(&mut config);
            assert_eq!(config["linux"].get("seccomp").is_some(), stays, "{config}");
        }
    }
}

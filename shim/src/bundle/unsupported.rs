//! Fields of config.json that this version does not honour: refused by name, never dropped.

use serde_json::Value;

use crate::error::{Error, Result};

const NO_LISTENER: &str = "a listener on the host cannot reach system calls in a microVM";

/// Refused when set to anything but their neutral value, with the reason.
const REFUSED: &[(&str, &str)] = &[
    ("/hooks/createContainer", "hooks inside the microVM are not run by this version"),
    ("/hooks/startContainer", "hooks inside the microVM are not run by this version"),
    ("/solaris", "it is for another operating system"),
    ("/windows", "it is for another operating system"),
    ("/zos", "it is for another operating system"),
    ("/vm", "kernel and image are set in the configuration of isopod, not by the container"),
    ("/uidMappings", "the specification has it under linux"),
    ("/gidMappings", "the specification has it under linux"),
    ("/linux/timeOffsets", "clocks of a container cannot be shifted yet"),
    ("/linux/seccomp/listenerPath", NO_LISTENER),
    ("/linux/seccomp/listenerMetadata", NO_LISTENER),
    ("/linux/intelRdt", "cache allocation of the host does not reach into a microVM"),
    ("/linux/netDevices", "devices of the host cannot be moved into a microVM"),
    ("/linux/memoryPolicy", "a microVM has one memory node"),
    ("/linux/resources/blockIO", "it is not honoured by this version"),
    ("/linux/resources/hugepageLimits", "it is not honoured by this version"),
    ("/linux/resources/network", "it is not honoured by this version"),
    ("/linux/resources/rdma", "a microVM has no RDMA devices"),
    ("/linux/resources/unified", "it is not honoured by this version"),
    ("/linux/resources/memory/kernel", "cgroup v2, which the guest uses, has no such limit"),
    ("/linux/resources/memory/kernelTCP", "cgroup v2, which the guest uses, has no such limit"),
    ("/linux/resources/memory/swappiness", "cgroup v2, which the guest uses, has no such setting"),
    ("/linux/resources/memory/disableOOMKiller", "cgroup v2, which the guest uses, cannot do it"),
    ("/linux/resources/cpu/realtimeRuntime", "cgroup v2, which the guest uses, cannot do it"),
    ("/linux/resources/cpu/realtimePeriod", "cgroup v2, which the guest uses, cannot do it"),
    ("/linux/resources/cpu/idle", "it is not honoured by this version"),
    ("/linux/resources/cpu/burst", "it is not honoured by this version"),
];

/// Where an update's fields are in a config.json.
const RESOURCES: &str = "/linux/resources";

/// As [`REFUSED`], relative to a `process` object.
const REFUSED_IN_PROCESS: &[(&str, &str)] = &[
    ("/commandLine", "it is for another operating system"),
    ("/scheduler", "it is not honoured by this version"),
    ("/ioPriority", "it is not honoured by this version"),
    ("/execCPUAffinity", "it is not honoured by this version"),
];

/// Settings of the host's security modules. The microVM takes their place, so they
/// have no effect, which is documented and logged.
const HOST_ONLY: &[&str] =
    &["/process/apparmorProfile", "/process/selinuxLabel", "/linux/mountLabel"];

/// Refuses a config.json that asks for what this version cannot do.
///
/// # Errors
///
/// The first such field, by name.
pub(super) fn refuse(config: &Value) -> Result<()> {
    refuse_from(config, "", REFUSED)?;
    if let Some(process) = config.get("process") {
        refuse_from(process, "process", REFUSED_IN_PROCESS)?;
    }
    refuse_memory_nodes("config.json", config.pointer("/linux/resources"))?;
    match config.pointer("/linux/personality/domain").and_then(Value::as_str) {
        None | Some("LINUX") => {}
        Some(other) => {
            return Err(Error::new(format!(
                "linux.personality is {other}, which this version does not support: only LINUX is"
            )));
        }
    }
    if config.pointer("/linux/personality/flags").is_some_and(|flags| !is_neutral(flags)) {
        return Err(refusal(
            "config.json",
            "linux.personality.flags",
            "the specification defines none",
        ));
    }
    Ok(())
}

/// Refuses a `process` object that asks for what this version cannot do.
///
/// # Errors
///
/// The first such field, by name.
pub(super) fn refuse_process(process: &Value) -> Result<()> {
    refuse_from(process, "process", REFUSED_IN_PROCESS)
}

/// Refuses the `linux.resources` object of an update, `name`, that asks for what this version cannot do.
///
/// # Errors
///
/// The first such field, by name.
pub(super) fn refuse_resources(name: &str, resources: &Value) -> Result<()> {
    for (pointer, reason) in REFUSED {
        if let Some(rest) = pointer.strip_prefix(RESOURCES)
            && resources.pointer(rest).is_some_and(|found| !is_neutral(found))
        {
            return Err(refusal(name, &dotted("", pointer), reason));
        }
    }
    refuse_memory_nodes(name, Some(resources))
}

fn refuse_memory_nodes(name: &str, resources: Option<&Value>) -> Result<()> {
    let nodes = resources.and_then(|resources| resources.pointer("/cpu/mems")?.as_str());
    match nodes {
        None | Some("" | "0") => Ok(()),
        Some(_) => {
            let reason = "a microVM has one memory node, which is 0";
            Err(refusal(name, "linux.resources.cpu.mems", reason))
        }
    }
}

/// Logs the fields that are accepted and have no effect.
pub(super) fn note_host_only(config: &Value) {
    for pointer in HOST_ONLY {
        if config.pointer(pointer).is_some_and(|value| !is_neutral(value)) {
            log::debug!("{} has no effect: the microVM takes its place", dotted("", pointer));
        }
    }
}

fn refuse_from(value: &Value, base: &str, table: &[(&str, &str)]) -> Result<()> {
    for (pointer, reason) in table {
        if value.pointer(pointer).is_some_and(|found| !is_neutral(found)) {
            return Err(refusal("config.json", &dotted(base, pointer), reason));
        }
    }
    Ok(())
}

fn refusal(name: &str, field: &str, reason: &str) -> Error {
    Error::new(format!("{name} sets {field}, which is not supported: {reason}"))
}

/// `/linux/resources` as `linux.resources`.
fn dotted(base: &str, pointer: &str) -> String {
    format!("{base}{}", pointer.replace('/', ".")).trim_start_matches('.').to_owned()
}

/// A value that asks for nothing: engines write empty objects, zeros and -1 for "no limit".
fn is_neutral(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(n) => n.as_i64() == Some(0) || n.as_i64() == Some(-1),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.values().all(is_neutral),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn each_unsupported_field_is_refused_by_its_name() {
        for (config, name) in [
            (json!({"hooks": {"startContainer": [{"path": "/x"}]}}), "hooks.startContainer"),
            (json!({"linux": {"timeOffsets": {"monotonic": {"secs": 5}}}}), "linux.timeOffsets"),
            (json!({"linux": {"intelRdt": {"closID": "x"}}}), "linux.intelRdt"),
            (json!({"linux": {"resources": {"unified": {"a": "b"}}}}), "linux.resources.unified"),
            (json!({"process": {"scheduler": {"policy": "SCHED_FIFO"}}}), "process.scheduler"),
            (json!({"linux": {"resources": {"cpu": {"mems": "0-1"}}}}), "linux.resources.cpu.mems"),
            (json!({"linux": {"personality": {"domain": "LINUX32"}}}), "linux.personality"),
        ] {
            let error = refuse(&config).unwrap_err();
            assert!(error.message.contains(name), "{error}");
        }
    }

    #[test]
    fn neutral_values_of_engines_pass() {
        refuse(&json!({
            "hooks": {"prestart": [], "poststop": null},
            "linux": {
                "timeOffsets": {"monotonic": {"secs": 0}},
                "personality": {"domain": "LINUX"},
                "resources": {
                    "blockIO": {"weight": 0},
                    "memory": {"kernel": -1, "disableOOMKiller": false, "swappiness": null},
                    "cpu": {"shares": 0, "realtimePeriod": 0, "mems": "0"}
                }
            }
        }))
        .unwrap();
    }
}

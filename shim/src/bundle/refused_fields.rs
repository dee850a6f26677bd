//! Fields of config.json that this version does not honour. They are refused by name, never
//! dropped.
//!
//! The agent refuses what it does not know as well: its types are in `agent/src/oci.rs`, its own
//! refusals in `agent/src/container/spec.rs`.

use serde_json::Value;

use crate::error::{Error, Result};

/// The reason to refuse limits on devices of the host.
pub(super) const NO_HOST_DEVICE: &str =
    "limits of a block device do not reach from the host into the microVM";

const NO_LISTENER: &str = "a listener on the host cannot reach system calls in a microVM";

/// Fields that are refused unless their value is neutral, with the reason.
const REFUSED: &[(&str, &str)] = &[
    ("/solaris", "it is for another operating system"),
    ("/windows", "it is for another operating system"),
    ("/zos", "it is for another operating system"),
    ("/vm", "kernel and image are set in the configuration of isopod, not by the container"),
    ("/uidMappings", "the specification has it under linux"),
    ("/gidMappings", "the specification has it under linux"),
    ("/linux/seccomp/listenerPath", NO_LISTENER),
    ("/linux/seccomp/listenerMetadata", NO_LISTENER),
    ("/linux/netDevices", "devices of the host cannot be moved into a microVM"),
    ("/linux/memoryPolicy", "a microVM has one memory node"),
    ("/linux/resources/blockIO/leafWeight", "cgroup v2, which the guest uses, has no such weight"),
    ("/linux/resources/blockIO/weightDevice", NO_HOST_DEVICE),
    ("/linux/resources/blockIO/throttleReadBpsDevice", NO_HOST_DEVICE),
    ("/linux/resources/blockIO/throttleWriteBpsDevice", NO_HOST_DEVICE),
    ("/linux/resources/blockIO/throttleReadIOPSDevice", NO_HOST_DEVICE),
    ("/linux/resources/blockIO/throttleWriteIOPSDevice", NO_HOST_DEVICE),
    ("/linux/resources/network/classID", "cgroup v2, which the guest uses, does not mark packets"),
    ("/linux/resources/network/priorities", "cgroup v2, which the guest uses, has none"),
    ("/linux/resources/rdma", "a microVM has no RDMA devices"),
    ("/linux/resources/memory/disableOOMKiller", "cgroup v2, which the guest uses, cannot do it"),
    ("/linux/resources/cpu/realtimeRuntime", "cgroup v2, which the guest uses, cannot do it"),
    ("/linux/resources/cpu/realtimePeriod", "cgroup v2, which the guest uses, cannot do it"),
    ("/linux/personality/flags", "the specification defines none"),
];

/// Fields of [`REFUSED`] whose values are named by keys: a key alone asks for something.
const MAPS: [&str; 2] = ["/linux/netDevices", "/linux/resources/rdma"];

/// The place of an update's fields in config.json.
const RESOURCES: &str = "/linux/resources";

/// [`REFUSED`] for a `process` object.
const REFUSED_IN_PROCESS: &[(&str, &str)] =
    &[("/commandLine", "it is for another operating system")];

/// Fields that are accepted without effect, with the reason. They are documented and logged.
const NO_EFFECT: &[(&str, &str)] = &[
    ("/process/apparmorProfile", INSTEAD),
    ("/process/selinuxLabel", INSTEAD),
    ("/process/user/username", "users have numbers on Linux"),
    ("/process/execCPUAffinity/initial", "processes are born in the container's cgroup"),
    ("/linux/mountLabel", INSTEAD),
    ("/linux/intelRdt", "the microVM has no cache of its own to allocate"),
    ("/linux/resources/memory/kernel", "it is part of linux.resources.memory.limit"),
    ("/linux/resources/memory/kernelTCP", "it is part of linux.resources.memory.limit"),
    ("/linux/resources/memory/swappiness", "the guest has no swap"),
    ("/linux/resources/memory/useHierarchy", "limits hold for groups below too, always"),
];

const INSTEAD: &str = "the microVM takes its place";

/// Refuses a config.json that asks for something this version cannot do. The error names the first
/// such field.
pub(super) fn refuse(config: &Value) -> Result<()> {
    refuse_from(config, "", REFUSED)?;
    if let Some(process) = config.get("process") {
        refuse_from(process, "process", REFUSED_IN_PROCESS)?;
    }
    refuse_memory_nodes("config.json", config.pointer("/linux/resources"))?;
    Ok(())
}

/// Refuses a `process` object that asks for something this version cannot do. The error names the
/// first such field.
pub(super) fn refuse_process(process: &Value) -> Result<()> {
    refuse_from(process, "process", REFUSED_IN_PROCESS)
}

/// Refuses the `linux.resources` object of an update that asks for something this version cannot
/// do. The error names the object by `name`, and the first such field.
pub(super) fn refuse_resources(name: &str, resources: &Value) -> Result<()> {
    for (pointer, reason) in REFUSED {
        if let Some(rest) = pointer.strip_prefix(RESOURCES)
            && resources.pointer(rest).is_some_and(|found| asks(pointer, found))
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
pub(super) fn note_no_effect(config: &Value) {
    for (pointer, reason) in NO_EFFECT {
        if config.pointer(pointer).is_some_and(|value| !is_neutral(value)) {
            log::debug!("{} has no effect: {reason}", dotted("", pointer));
        }
    }
}

fn refuse_from(value: &Value, base: &str, table: &[(&str, &str)]) -> Result<()> {
    for (pointer, reason) in table {
        if value.pointer(pointer).is_some_and(|found| asks(pointer, found)) {
            return Err(refusal("config.json", &dotted(base, pointer), reason));
        }
    }
    Ok(())
}

fn refusal(name: &str, field: &str, reason: &str) -> Error {
    Error::new(format!("{name} sets {field}, which is not supported: {reason}"))
}

/// Converts `/linux/resources` to `linux.resources`, below `base`.
fn dotted(base: &str, pointer: &str) -> String {
    format!("{base}{}", pointer.replace('/', ".")).trim_start_matches('.').to_owned()
}

/// Tells whether the value of a field asks for anything.
fn asks(pointer: &str, value: &Value) -> bool {
    match value {
        Value::Object(fields) if MAPS.contains(&pointer) => !fields.is_empty(),
        value => !is_neutral(value),
    }
}

/// Tells whether a value asks for nothing. Engines write empty objects, zeros, and -1 for "no
/// limit".
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
        for (config, message) in [
            (
                json!({"linux": {"netDevices": {"eth1": {"name": "x"}}}}),
                "config.json sets linux.netDevices, which is not supported: devices of the host \
                 cannot be moved into a microVM",
            ),
            (
                json!({"linux": {"netDevices": {"eth0": {}}}}),
                "config.json sets linux.netDevices, which is not supported: devices of the host \
                 cannot be moved into a microVM",
            ),
            (
                json!({"linux": {"resources": {"rdma": {"mlx5_0": {"hcaHandles": 0}}}}}),
                "config.json sets linux.resources.rdma, which is not supported: a microVM has no \
                 RDMA devices",
            ),
            (
                json!({"linux": {"resources": {"blockIO":
                    {"throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}]}}}}),
                "config.json sets linux.resources.blockIO.throttleReadBpsDevice, which is not \
                 supported: limits of a block device do not reach from the host into the microVM",
            ),
            (
                json!({"process": {"commandLine": "x"}}),
                "config.json sets process.commandLine, which is not supported: it is for another \
                 operating system",
            ),
            (
                json!({"linux": {"resources": {"cpu": {"mems": "0-1"}}}}),
                "config.json sets linux.resources.cpu.mems, which is not supported: a microVM has \
                 one memory node, which is 0",
            ),
        ] {
            assert_eq!(refuse(&config).unwrap_err().message, message);
        }
    }

    #[test]
    fn neutral_values_of_engines_pass() {
        refuse(&json!({
            "hooks": {"prestart": [], "poststop": null},
            "linux": {
                "personality": {"domain": "LINUX", "flags": []},
                "resources": {
                    "blockIO": {"weight": 0},
                    "memory": {"disableOOMKiller": false},
                    "cpu": {"shares": 0, "realtimePeriod": 0, "mems": "0"}
                }
            }
        }))
        .unwrap();
    }
}

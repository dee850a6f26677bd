//! config.json in the agent: parsed, and refused if a field cannot be honoured.
//!
//! The host side has validated the same document before. This second check knows the guest's
//! abilities.

use std::path::{Component, Path};
use std::time::Duration;

use super::mount_options::{self, MountOptions};
use super::namespaces::{self, Join, Namespaces};
use super::{hooks, resources};
use crate::error::{Error, Result};
use crate::log::log_warn;
use crate::oci::{Linux, Mount, ProcessSpec, Spec, parse_json};

/// A container's specification that has passed [`ContainerSpec::parse`].
pub(crate) struct ContainerSpec {
    pub(crate) spec: Spec,
    pub(crate) linux: Linux,
    pub(crate) process: ProcessSpec,
    pub(crate) namespaces: Namespaces,
    /// Namespaces shared with other containers.
    pub(crate) joins: Vec<Join>,
}

impl ContainerSpec {
    /// Reads and checks a whole config.json. The error names the first field that cannot be
    /// honoured.
    pub(crate) fn parse(json: &[u8]) -> Result<Self> {
        let mut spec: Spec = parse_json("config.json", json)?;
        let process = spec.process.take().ok_or_else(|| Error::invalid("process", "missing"))?;
        let linux = spec.linux.take().ok_or_else(|| Error::invalid("linux", "missing"))?;
        let (namespaces, joins) = Namespaces::of(&linux)?;
        let parsed = Self { spec, linux, process, namespaces, joins };
        parsed.check()?;
        Ok(parsed)
    }

    /// Path of the root file system in the guest.
    pub(crate) fn rootfs(&self) -> &Path {
        self.spec.root.as_ref().map_or(Path::new(""), |root| &root.path)
    }

    /// The number of `linux.personality`, if it is there.
    pub(crate) fn personality(&self) -> Result<Option<u32>> {
        self.linux.personality.as_ref().map(super::scheduling::personality).transpose()
    }

    /// Longest time that one round of hooks in the guest may take. `None` if there is no limit.
    pub(crate) fn hooks_limit(&self) -> Option<Duration> {
        let Some(hooks) = &self.spec.hooks else { return Some(Duration::ZERO) };
        let create = hooks::time_limit(&hooks.create_container)?;
        Some(create.max(hooks::time_limit(&hooks.start_container)?))
    }

    fn check(&self) -> Result<()> {
        if !self.rootfs().is_absolute() {
            return Err(Error::invalid("root.path", "not an absolute path in the guest"));
        }
        check_process(&self.process, "process")?;
        namespaces::check(&self.spec, &self.linux, self.namespaces)?;
        for (i, mount) in self.spec.mounts.iter().enumerate() {
            check_mount(i, mount)?;
        }
        check_linux(&self.linux)?;
        if let Some(hooks) = &self.spec.hooks {
            // The other hooks run on the host.
            hooks::check("hooks.createContainer", &hooks.create_container)?;
            hooks::check("hooks.startContainer", &hooks.start_container)?;
        }
        for (name, present) in [
            ("windows", self.spec.windows.is_some()),
            ("solaris", self.spec.solaris.is_some()),
            ("zos", self.spec.zos.is_some()),
        ] {
            if present {
                return Err(Error::invalid(name, "the sandbox runs Linux"));
            }
        }
        Ok(())
    }
}

/// Reads and checks the `process` object of a further process.
pub(crate) fn parse_process(json: &[u8]) -> Result<ProcessSpec> {
    let process = parse_json("process", json)?;
    check_process(&process, "process")?;
    Ok(process)
}

fn check_process(process: &ProcessSpec, field: &str) -> Result<()> {
    let (args, env) = (&process.args, &process.env);
    if args.first().is_none_or(String::is_empty) {
        return Err(Error::invalid(format!("{field}.args"), "no program is named"));
    }
    for (name, list) in [("args", args), ("env", env)] {
        if list.iter().any(|text| text.contains('\0')) {
            return Err(Error::invalid(format!("{field}.{name}"), "contains a NUL character"));
        }
    }
    super::environment::check(env, &format!("{field}.env"))?;
    if !process.cwd.is_absolute() {
        let why = format!("{:?} is not an absolute path", process.cwd);
        return Err(Error::invalid(format!("{field}.cwd"), why));
    }
    if let Some(mask) = process.user.umask
        && mask > 0o777
    {
        return Err(Error::invalid(
            format!("{field}.user.umask"),
            format!("{mask:o} is larger than 777"),
        ));
    }
    if let Some(score) = process.oom_score_adj
        && !(-1000..=1000).contains(&score)
    {
        let why = format!("{score} is not from -1000 to 1000");
        return Err(Error::invalid(format!("{field}.oomScoreAdj"), why));
    }
    check_rlimits(process, field)?;
    super::scheduling::check(process)?;
    if let Some(capabilities) = &process.capabilities {
        super::credentials::warn(capabilities);
    }
    for (name, present) in [("commandLine", process.command_line.is_some())] {
        if present {
            return Err(Error::invalid(format!("{field}.{name}"), "not supported in a sandbox"));
        }
    }
    // The labels belong to security modules of the host, which the guest does not have.
    for (name, label) in
        [("apparmorProfile", &process.apparmor_profile), ("selinuxLabel", &process.selinux_label)]
    {
        if !label.is_empty() {
            log_warn!("{field}.{name} has no effect inside a sandbox");
        }
    }
    Ok(())
}

fn check_rlimits(process: &ProcessSpec, field: &str) -> Result<()> {
    let mut seen = Vec::new();
    for limit in process.rlimits.iter().flatten() {
        let name = &limit.kind;
        if super::rlimits::resource(name).is_none() {
            return Err(Error::invalid(format!("{field}.rlimits"), format!("{name:?} is unknown")));
        }
        if seen.contains(&name) {
            return Err(Error::invalid(
                format!("{field}.rlimits"),
                format!("{name} is listed twice"),
            ));
        }
        if limit.soft > limit.hard {
            let why = format!("{name} has a soft limit above its hard limit");
            return Err(Error::invalid(format!("{field}.rlimits"), why));
        }
        seen.push(name);
    }
    Ok(())
}

fn check_mount(i: usize, mount: &Mount) -> Result<()> {
    let field = |name: &str| format!("mounts[{i}].{name}");
    let destination = &mount.destination;
    if destination.components().any(|c| c == Component::ParentDir) {
        return Err(Error::invalid(field("destination"), "contains \"..\""));
    }
    for (name, maps) in [("uidMappings", &mount.uid_mappings), ("gidMappings", &mount.gid_mappings)]
    {
        if !maps.is_empty() {
            return Err(Error::invalid(field(name), "not supported in a sandbox"));
        }
    }
    let options = MountOptions::of(mount).map_err(|why| Error::invalid(field("options"), why))?;
    if options.bind.is_some() && mount.source.is_none() {
        return Err(Error::invalid(field("source"), "missing for a bind mount"));
    }
    if options.bind.is_none() && mount.kind.as_ref().is_none_or(String::is_empty) {
        return Err(Error::invalid(field("type"), "missing"));
    }
    Ok(())
}

fn check_linux(linux: &Linux) -> Result<()> {
    resources::check(&linux.resources)?;
    // A privileged container lists every device of its host, and uses few of them.
    let privileged = super::devices::allow_everything(&linux.resources.devices);
    for device in &linux.devices {
        super::device_nodes::check(device)?;
        if !privileged {
            super::device_nodes::check_present(device)?;
        }
    }
    if !linux.rootfs_propagation.is_empty() {
        mount_options::rootfs_propagation(&linux.rootfs_propagation)?;
    }
    if let Some(personality) = &linux.personality {
        super::scheduling::personality(personality)?;
    }
    for (name, present) in [
        ("seccomp", linux.seccomp.is_some()),
        ("netDevices", !linux.net_devices.is_empty()),
        ("memoryPolicy", linux.memory_policy.is_some()),
    ] {
        if present {
            return Err(Error::invalid(format!("linux.{name}"), "not supported in a sandbox"));
        }
    }
    for (name, present) in
        [("mountLabel", !linux.mount_label.is_empty()), ("intelRdt", linux.intel_rdt.is_some())]
    {
        if present {
            log_warn!("linux.{name} has no effect inside a sandbox");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = r#"{"ociVersion": "1.0.2", "root": {"path": "/r"},
        "process": {"user": {}, "args": ["sh"], "cwd": "/"},
        "linux": {"namespaces": [{"type": "mount"}]}}"#;

    fn refused(path: &[&str], value: serde_json::Value) -> String {
        let mut spec: serde_json::Value = serde_json::from_str(MINIMAL).unwrap();
        let (last, parents) = path.split_last().unwrap();
        let mut at = &mut spec;
        for parent in parents {
            at = &mut at[*parent];
        }
        at[*last] = value;
        match ContainerSpec::parse(spec.to_string().as_bytes()) {
            Ok(_) => panic!("{path:?} was accepted"),
            Err(e) => e.message,
        }
    }

    #[test]
    fn the_minimal_specification_passes() {
        assert!(ContainerSpec::parse(MINIMAL.as_bytes()).is_ok());
    }

    #[test]
    fn nulls_are_absent_and_unknown_fields_are_not_dropped() {
        let null =
            MINIMAL.replace(r#""ociVersion""#, r#""mounts": null, "hooks": null, "ociVersion""#);
        assert!(ContainerSpec::parse(null.as_bytes()).is_ok());
        let message = refused(&["linux", "somethingNew"], serde_json::json!(1));
        assert_eq!(message, "config.json: unknown field `somethingNew`");
    }

    #[test]
    fn hooks_are_checked() {
        use serde_json::json;
        for (hook, why) in [
            (json!({"path": "x"}), "[0].path: not an absolute path"),
            (json!({"path": "/x", "timeout": 0}), "[0].timeout: not more than 0"),
            (json!({"path": "/x", "timeout": -1}), "invalid value"),
            (json!({"path": "/x", "user": "me"}), "unknown field `user`"),
        ] {
            for point in ["createContainer", "startContainer"] {
                let message = refused(&["hooks"], json!({ (point): [hook] }));
                assert!(message.contains(why), "{message}");
            }
        }
    }

    #[test]
    fn unsupported_fields_are_named() {
        use serde_json::json;
        for (path, value) in [
            (&["linux", "seccomp"][..], json!({"defaultAction": "SCMP_ACT_ALLOW"})),
            (&["linux", "personality"], json!({"domain": "LINUX64"})),
            (&["linux", "rootfsPropagation"], json!("sideways")),
            (&["linux", "timeOffsets"], json!({"monotonic": {"secs": 1}})),
            (&["process", "scheduler"], json!({"policy": "SCHED_ISO"})),
            (&["process", "ioPriority"], json!({"class": "IOPRIO_CLASS_RT", "priority": 8})),
            (&["process", "cwd"], json!("tmp")),
            (&["process", "args"], json!([])),
            (&["process", "oomScoreAdj"], json!(1001)),
            (&["process", "rlimits"], json!([{"type": "RLIMIT_CORE", "soft": 2, "hard": 1}])),
            (&["hostname"], json!("x")),
            (&["mounts"], json!([{"destination": "/a/../b", "type": "tmpfs"}])),
        ] {
            let message = refused(path, value);
            assert!(message.contains(path.last().unwrap()), "{path:?}: {message}");
        }
    }
}

//! Checks of a parsed config.json that its types cannot express.

use std::{
    collections::HashSet,
    fs,
    path::{Component, Path, PathBuf},
};

use oci_spec::runtime::{Capability, Hook, Hooks, LinuxNamespaceType, Process, Spec};

use crate::{
    bundle::{
        bind::{has_option, is_bind},
        disk,
        id_map::IdMap,
        mount_options, owner, pod, resources, scheduling,
    },
    error::{Error, Explain, Result},
    logger,
};

/// Types of mounts that the guest makes itself.
const GUEST_MOUNTS: &[&str] = &["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];

/// Namespaces that every container has to have of its own. Without one of them it would share the
/// host's, and the host's namespaces are not in the microVM.
const REQUIRED_NAMESPACES: &[LinuxNamespaceType] =
    &[LinuxNamespaceType::Mount, LinuxNamespaceType::Pid, LinuxNamespaceType::Ipc];

/// Checks everything but the host paths that the specification names.
pub(super) fn spec(spec: &Spec) -> Result<()> {
    if !spec.version().starts_with("1.") {
        return Err(Error::new(format!(
            "config.json has ociVersion {:?}; this runtime supports 1.x",
            spec.version()
        )));
    }
    let process =
        spec.process().as_ref().ok_or_else(|| Error::new("config.json has no process"))?;
    self::process(process)?;
    match spec.root() {
        None => return Err(Error::new("config.json has no root")),
        Some(root) if root.path().as_os_str().is_empty() => {
            return Err(Error::new("config.json has an empty root.path"));
        }
        Some(_) => {}
    }
    if let Some(hooks) = spec.hooks() {
        self::hooks(hooks)?;
    }
    namespaces(spec)?;
    mounts(spec)?;
    if let Some(linux) = spec.linux() {
        for device in linux.devices().iter().flatten() {
            absolute("linux.devices", device.path())?;
            for (field, id) in [("uid", device.uid()), ("gid", device.gid())] {
                owner::id(&format!("linux.devices: {field}"), id.unwrap_or_default())?;
            }
        }
        for (field, paths) in [
            ("linux.maskedPaths", linux.masked_paths()),
            ("linux.readonlyPaths", linux.readonly_paths()),
        ] {
            for path in paths.iter().flatten() {
                absolute(field, Path::new(path))?;
            }
        }
        propagation(linux.rootfs_propagation().as_deref())?;
        resources::check(linux)?;
    }
    Ok(())
}

/// Checks a `process` object.
pub(super) fn process(process: &Process) -> Result<()> {
    let args = process.args().as_deref().unwrap_or_default();
    if args.first().is_none_or(String::is_empty) {
        return Err(Error::new("process.args is empty: there is no program to run"));
    }
    if process.cwd().as_os_str().is_empty() {
        return Err(Error::new("process.cwd is empty"));
    }
    absolute("process.cwd", process.cwd())?;
    let env = process.env().as_deref().unwrap_or_default();
    for (field, texts) in [("process.args", args), ("process.env", env)] {
        if texts.iter().any(|text| text.contains('\0')) {
            return Err(Error::new(format!("{field} contains a NUL byte")));
        }
    }
    for (index, entry) in env.iter().enumerate() {
        let why = match entry.split_once('=') {
            Some(("", _)) => "has no name in front of its '='",
            Some(_) => continue,
            None => "has no '='; entries are NAME=VALUE",
        };
        return Err(Error::new(format!("process.env[{index}] is {entry:?}, which {why}")));
    }
    scheduling::check(process)?;
    owner::user(process.user())?;
    if let Some(umask) = process.user().umask().filter(|umask| *umask > 0o777) {
        return Err(Error::new(format!(
            "process.user.umask is {umask:#o}; it has to be from 0 to 0o777 (511)"
        )));
    }
    let mut limits = HashSet::new();
    for limit in process.rlimits().iter().flatten() {
        let name = limit.typ().to_string();
        if limit.soft() > limit.hard() {
            return Err(Error::new(format!(
                "process.rlimits: the soft limit of {name} is above its hard limit"
            )));
        }
        if !limits.insert(name.clone()) {
            return Err(Error::new(format!("process.rlimits has {name} twice")));
        }
    }
    ambient(process);
    if let Some(adjustment) = process.oom_score_adj().filter(|n| !(-1000..=1000).contains(n)) {
        return Err(Error::new(format!(
            "process.oomScoreAdj is {adjustment}; it has to be from -1000 to 1000"
        )));
    }
    Ok(())
}

/// Warns of ambient capabilities that the guest leaves out, because the kernel would refuse them.
/// An ambient capability has to be permitted and inheritable too (capabilities(7)).
fn ambient(process: &Process) {
    let Some(capabilities) = process.capabilities() else { return };
    let refused = |one: &&Capability| {
        let sets = [capabilities.permitted(), capabilities.inheritable()];
        sets.into_iter().any(|set| set.as_ref().is_none_or(|set| !set.contains(*one)))
    };
    let mut names: Vec<String> = capabilities
        .ambient()
        .iter()
        .flatten()
        .filter(refused)
        .map(|one| format!("CAP_{one}"))
        .collect();
    if !names.is_empty() {
        names.sort();
        log::warn!(
            target: logger::FOR_THE_LOG,
            "process.capabilities.ambient: cannot raise {}: not permitted and inheritable",
            names.join(", ")
        );
    }
}

fn hooks(hooks: &Hooks) -> Result<()> {
    #[allow(deprecated, reason = "Docker uses it")]
    let prestart = hooks.prestart();
    for (point, hooks) in [
        ("prestart", prestart),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ] {
        for (index, hook) in hooks.iter().flatten().enumerate() {
            self::hook(&format!("hooks.{point}[{index}]"), hook)?;
        }
    }
    Ok(())
}

/// Finds the programs of the createContainer hooks. These programs are brought into the guest.
pub(super) fn guest_hooks(spec: &Spec) -> Result<Vec<PathBuf>> {
    let hooks = spec.hooks().as_ref().and_then(|hooks| hooks.create_container().as_deref());
    let hooks = hooks.unwrap_or_default().iter().enumerate();
    hooks
        .map(|(index, hook)| {
            let name = format!("hooks.createContainer[{index}]");
            let path = hook.path().display();
            let found = fs::canonicalize(hook.path())
                .explain(|| format!("{name}: cannot find its program {path}"))?;
            if found.is_file() {
                return Ok(found);
            }
            Err(Error::new(format!("{name}: {path} is not a file")))
        })
        .collect()
}

fn hook(name: &str, hook: &Hook) -> Result<()> {
    absolute(&format!("{name}.path"), hook.path())?;
    let texts = [hook.args(), hook.env()].into_iter().flatten().flatten();
    let path = hook.path().as_os_str().as_encoded_bytes();
    if path.contains(&0) || texts.into_iter().any(|text| text.contains('\0')) {
        return Err(Error::new(format!("{name} contains a NUL byte")));
    }
    if let Some(seconds) = hook.timeout().filter(|seconds| *seconds <= 0) {
        return Err(Error::new(format!(
            "{name}.timeout is {seconds}; it has to be more than 0 seconds"
        )));
    }
    Ok(())
}

fn namespaces(spec: &Spec) -> Result<()> {
    let linux = spec.linux().as_ref().ok_or_else(|| Error::new("config.json has no linux"))?;
    let mut seen = HashSet::new();
    for namespace in linux.namespaces().iter().flatten() {
        let kind = pod::kind_name(namespace.typ());
        if !seen.insert(namespace.typ()) {
            return Err(Error::new(format!("linux.namespaces has {kind} twice")));
        }
        // The network namespace, and those of a pod, are checked by `NetworkNamespace` and `pod`.
        let joins = namespace.typ() != LinuxNamespaceType::Network
            && !pod::is_user_namespace_of_pod(spec, namespace)
            && pod::holder(spec, namespace).is_none()
            && !pod::is_pinned(spec, namespace);
        if let Some(path) = namespace.path().as_ref().filter(|p| joins && !p.as_os_str().is_empty())
        {
            return Err(Error::new(format!(
                "linux.namespaces: joining the {kind} namespace {} is not supported: a microVM \
                 cannot enter a namespace of the host",
                path.display()
            )));
        }
    }
    for kind in REQUIRED_NAMESPACES {
        if !seen.contains(kind) {
            let kind = pod::kind_name(*kind);
            return Err(Error::new(format!(
                "linux.namespaces has no {kind} namespace: sharing the host's is not possible from \
                 a microVM"
            )));
        }
    }
    let named = [spec.hostname(), spec.domainname()];
    if !seen.contains(&LinuxNamespaceType::Uts)
        && named.iter().any(|name| name.as_ref().is_some_and(|name| !name.is_empty()))
    {
        return Err(Error::new("hostname or domainname is set without a uts namespace of its own"));
    }
    let mapped = [linux.uid_mappings(), linux.gid_mappings()];
    if !seen.contains(&LinuxNamespaceType::User)
        && mapped.iter().any(|mappings| mappings.as_ref().is_some_and(|m| !m.is_empty()))
    {
        return Err(Error::new("linux.uidMappings or gidMappings is set without a user namespace"));
    }
    for (field, mappings) in
        [("linux.uidMappings", linux.uid_mappings()), ("linux.gidMappings", linux.gid_mappings())]
    {
        let mappings = mappings.as_deref().unwrap_or_default();
        if mappings.is_empty() && seen.contains(&LinuxNamespaceType::User) {
            return Err(Error::new(format!("{field} is empty: a user namespace needs mappings")));
        }
        if let Some(index) = mappings.iter().position(|mapping| mapping.size() == 0) {
            return Err(Error::new(format!("{field}[{index}].size is 0: it maps nothing")));
        }
    }
    for (clock, offset) in linux.time_offsets().iter().flatten() {
        if !matches!(clock.as_str(), "monotonic" | "boottime") {
            return Err(Error::new(format!(
                "linux.timeOffsets has {clock:?}; the clocks are monotonic and boottime"
            )));
        }
        if offset.nanosecs().is_some_and(|nanoseconds| nanoseconds >= 1_000_000_000) {
            return Err(Error::new(format!(
                "linux.timeOffsets.{clock}.nanosecs has to be less than 1000000000"
            )));
        }
        if !seen.contains(&LinuxNamespaceType::Time) {
            return Err(Error::new("linux.timeOffsets is set without a time namespace"));
        }
    }
    Ok(())
}

fn mounts(spec: &Spec) -> Result<()> {
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        let name = format!("mounts[{index}] ({})", mount.destination().display());
        absolute(&format!("mounts[{index}].destination"), mount.destination())?;
        if mount.destination().components().any(|part| part == Component::ParentDir) {
            return Err(Error::new(format!("{name} has .. in its destination")));
        }
        IdMap::of(&name, mount, is_bind(mount), spec)?;
        mount_options::check(&name, mount, is_bind(mount))?;
        if is_bind(mount) {
            if has_option(mount, "shared") || has_option(mount, "rshared") {
                return Err(Error::new(format!(
                    "{name} asks for shared propagation, which is not supported: mounts made in \
                     the microVM cannot appear on the host"
                )));
            }
            continue;
        }
        let kind = mount.typ().as_deref().unwrap_or_default();
        if !GUEST_MOUNTS.contains(&kind) && !disk::is_of_disk(mount) {
            return Err(Error::new(format!(
                "{name} has type {kind:?}, which is not supported: bind, {}, and {} on a block device \
                 are",
                GUEST_MOUNTS.join(", "),
                disk::FILE_SYSTEMS.join(", ")
            )));
        }
    }
    Ok(())
}

fn propagation(value: Option<&str>) -> Result<()> {
    match value {
        None | Some("" | "private" | "rprivate" | "slave" | "rslave" | "unbindable") => Ok(()),
        Some("runbindable" | "shared" | "rshared") => Ok(()),
        Some(other) => Err(Error::new(format!(
            "linux.rootfsPropagation is {other:?}; it has to be shared, slave, private or \
             unbindable, with or without a leading r"
        ))),
    }
}

fn absolute(field: &str, path: &Path) -> Result<()> {
    if path.is_absolute() {
        return Ok(());
    }
    Err(Error::new(format!("{field} is {path:?}, which is not an absolute path")))
}

//! Checks of what config.json asks of the guest's kernel: limits and settings. Whether that kernel has
//! a setting, and takes the value, only it can tell.

use std::collections::HashMap;

use oci_spec::runtime::{Linux, LinuxMemory, LinuxNamespaceType};

use super::cpu_list_len;
use crate::error::{Error, Result};

/// System V IPC settings that each IPC namespace has for itself.
const IPC_SYSCTLS: [&str; 8] =
    ["msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced"];

/// Checks limits and settings.
///
/// # Errors
///
/// The first that no kernel could take, by name.
pub(super) fn check(linux: &Linux) -> Result<()> {
    if let Some(resources) = linux.resources() {
        if let Some(memory) = resources.memory() {
            self::memory(memory)?;
        }
        let cpus = resources.cpu().as_ref().and_then(|cpu| cpu.cpus().as_deref());
        if let Some(list) = cpus.map(str::trim).filter(|list| !list.is_empty())
            && cpu_list_len(list).is_none()
        {
            return Err(Error::new(format!(
                "linux.resources.cpu.cpus is {list:?}, which is not a list of CPUs"
            )));
        }
    }
    sysctls(linux.sysctl().as_ref(), |kind| {
        linux.namespaces().iter().flatten().any(|namespace| namespace.typ() == kind)
    })
}

/// The specification's swap is memory and swap together.
fn memory(memory: &LinuxMemory) -> Result<()> {
    let limit = memory.limit().unwrap_or(0);
    match memory.swap().unwrap_or(0) {
        0 | -1 => Ok(()),
        _ if limit <= 0 => Err(Error::new(
            "linux.resources.memory.swap is set without linux.resources.memory.limit: it limits \
             both together",
        )),
        sum if sum < limit => Err(Error::new(format!(
            "linux.resources.memory.swap is {sum}, which is memory and swap together and cannot be \
             less than linux.resources.memory.limit, {limit}"
        ))),
        _ => Ok(()),
    }
}

/// Only settings of a namespace that the container has for itself: all others are the guest's.
fn sysctls(
    settings: Option<&HashMap<String, String>>,
    has: impl Fn(LinuxNamespaceType) -> bool,
) -> Result<()> {
    for name in settings.into_iter().flatten().map(|(name, _)| name) {
        let refusal = |why: &str| Err(Error::new(format!("linux.sysctl has {name:?}, {why}")));
        let path = sysctl_path(name);
        if path.split('/').any(|part| matches!(part, "" | "." | "..")) || path.contains('\0') {
            return refusal("which is not the name of a kernel setting");
        }
        let ipc = path.strip_prefix("kernel/").is_some_and(|name| IPC_SYSCTLS.contains(&name));
        let (kind, namespace) = if path.starts_with("net/") {
            (LinuxNamespaceType::Network, "network")
        } else if path.starts_with("fs/mqueue/") || ipc {
            (LinuxNamespaceType::Ipc, "ipc")
        } else if path == "kernel/domainname" {
            (LinuxNamespaceType::Uts, "uts")
        } else if path == "kernel/hostname" {
            return refusal("which the field hostname sets");
        } else {
            return refusal("which is not a setting of a namespace");
        };
        if !has(kind) {
            return refusal(&format!("which needs a {namespace} namespace of its own"));
        }
    }
    Ok(())
}

/// Dots separate the parts of a name unless a slash comes first, as sysctl(8) has it.
fn sysctl_path(name: &str) -> String {
    let swapped = |c| match c {
        '.' => '/',
        '/' => '.',
        c => c,
    };
    match name.find(['.', '/']) {
        Some(at) if name[at..].starts_with('.') => name.chars().map(swapped).collect(),
        _ => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(linux: &str) -> Option<String> {
        check(&serde_json::from_str(linux).unwrap()).err().map(|error| error.message)
    }

    #[test]
    fn limits_have_to_make_sense() {
        let memory = |fields: &str| failure(&format!(r#"{{"resources":{{"memory":{fields}}}}}"#));
        assert_eq!(memory(r#"{"limit":100,"swap":100}"#), None);
        assert_eq!(memory(r#"{"limit":100,"swap":-1}"#), None);
        assert_eq!(memory(r#"{"swap":0}"#), None);
        assert!(memory(r#"{"limit":100,"swap":99}"#).unwrap().contains("cannot be less"));
        assert!(memory(r#"{"swap":99}"#).unwrap().contains("memory.limit"));
        let cpu = failure(r#"{"resources":{"cpu":{"quota":50000,"cpus":"3-1"}}}"#).unwrap();
        assert!(cpu.contains("\"3-1\""), "{cpu}");
    }

    #[test]
    fn settings_of_the_whole_guest_are_refused() {
        let sysctl = |name: &str| {
            failure(&format!(
                r#"{{"namespaces":[{{"type":"network"}},{{"type":"uts"}}],"sysctl":{{"{name}":"1"}}}}"#
            ))
        };
        for name in [
            "net.ipv4.ip_forward",
            "net/ipv4/conf/eth0.1/forwarding",
            "net.ipv4.conf.eth0/1.x",
            "kernel.domainname",
        ] {
            assert_eq!(sysctl(name), None);
        }
        for name in ["kernel.panic", "kernel.shmmax", "net/../x", "net..x", "kernel.hostname", ""] {
            let error = sysctl(name).unwrap();
            assert!(error.contains(&format!("{name:?}")), "{error}");
        }
    }
}

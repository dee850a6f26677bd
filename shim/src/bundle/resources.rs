//! Checks of limits and kernel settings in config.json. Only the guest's kernel can tell whether it
//! has a setting and takes the value.

use std::collections::HashMap;

use isopod_protocol::sysctl::{self, Owner, Refusal};
use oci_spec::runtime::{Linux, LinuxCpu, LinuxMemory, LinuxNamespaceType, LinuxResources};

use crate::{
    bundle::refused_fields::NO_HOST_DEVICE,
    cpu_list::cpu_list_len,
    error::{Error, Result},
};

/// Checks limits and settings. The error names the first one that no kernel could take.
pub(super) fn check(linux: &Linux) -> Result<()> {
    if let Some(resources) = linux.resources() {
        if let Some(memory) = resources.memory() {
            self::memory(memory)?;
        }
        if let Some(cpu) = resources.cpu() {
            self::cpu(cpu)?;
        }
        unified(resources)?;
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

/// Checks values that the kernel would refuse with an error number alone.
fn cpu(cpu: &LinuxCpu) -> Result<()> {
    let set = |value: Option<u64>| value.is_some_and(|value| value != 0);
    if cpu.idle().is_some_and(|idle| !matches!(idle, 0 | 1)) {
        return Err(Error::new("linux.resources.cpu.idle has to be 0 or 1"));
    }
    if cpu.idle() == Some(1) && set(cpu.shares()) {
        return Err(Error::new(
            "linux.resources.cpu.shares has no meaning with linux.resources.cpu.idle 1: leave one out",
        ));
    }
    let quota = cpu.quota().and_then(|quota| u64::try_from(quota).ok()).filter(|n| *n > 0);
    match (cpu.burst().filter(|burst| *burst > 0), quota) {
        (Some(burst), None) => Err(Error::new(format!(
            "linux.resources.cpu.burst is {burst}, without a linux.resources.cpu.quota to exceed"
        ))),
        (Some(burst), Some(quota)) if burst > quota => Err(Error::new(format!(
            "linux.resources.cpu.burst is {burst}; it cannot be more than \
             linux.resources.cpu.quota, {quota}"
        ))),
        _ => Ok(()),
    }
}

/// Checks the names and values of interface files of cgroup v2.
fn unified(resources: &LinuxResources) -> Result<()> {
    for (file, value) in resources.unified().iter().flatten() {
        let field = format!("linux.resources.unified has {file:?}");
        let named = file.contains('.') && !file.starts_with("cgroup.");
        if !named || file.contains(['/', '\0']) {
            return Err(Error::new(format!(
                "{field}, which is not the interface file of a controller"
            )));
        }
        if file.starts_with("io.") && value.contains(':') {
            return Err(Error::new(format!(
                "{field} with {value:?}, which is not supported: {NO_HOST_DEVICE}"
            )));
        }
        if file == "cpuset.mems" && !matches!(value.trim(), "" | "0") {
            return Err(Error::new(format!(
                "{field} with {value:?}, which is not supported: a microVM has one memory node, \
                 which is 0"
            )));
        }
        if file == "cpuset.cpus" && cpu_list_len(value.trim()).is_none() {
            return Err(Error::new(format!("{field} with {value:?}, which is not a list of CPUs")));
        }
    }
    Ok(())
}

/// Checks the memory limits. The specification's swap is memory and swap together.
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

/// Checks that each setting belongs to a namespace of the container's own. All other settings are
/// the guest's.
fn sysctls(
    settings: Option<&HashMap<String, String>>,
    has: impl Fn(LinuxNamespaceType) -> bool,
) -> Result<()> {
    for name in settings.into_iter().flatten().map(|(name, _)| name) {
        let refusal = |why: &str| Err(Error::new(format!("linux.sysctl has {name:?}, {why}")));
        let (kind, namespace) = match sysctl::owner(name) {
            Ok(Owner::Network) => (LinuxNamespaceType::Network, "network"),
            Ok(Owner::Ipc) => (LinuxNamespaceType::Ipc, "ipc"),
            Ok(Owner::Uts) => (LinuxNamespaceType::Uts, "uts"),
            Err(Refusal::NotAName) => return refusal("which is not the name of a kernel setting"),
            Err(Refusal::Hostname) => return refusal("which the field hostname sets"),
            Err(Refusal::Global) => return refusal("which is not a setting of a namespace"),
        };
        if !has(kind) {
            return refusal(&format!("which needs a {namespace} namespace of its own"));
        }
    }
    Ok(())
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

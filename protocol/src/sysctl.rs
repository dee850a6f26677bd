//! Names of kernel settings in `linux.sysctl`, and the namespaces that they belong to.
//!
//! The host refuses all other settings before it makes anything, and the agent when it would set
//! them.

/// System V IPC settings that each IPC namespace has for itself.
const IPC: [&str; 8] =
    ["msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced"];

/// Namespace that owns a setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// A network namespace.
    Network,
    /// An IPC namespace.
    Ipc,
    /// A UTS namespace.
    Uts,
}

/// Reason to refuse a setting to a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The text is not the name of a setting.
    NotAName,
    /// The field `hostname` sets it.
    Hostname,
    /// The setting belongs to the whole guest.
    Global,
}

/// The path of a setting below `/proc/sys`.
///
/// Dots separate the parts of a name, unless a slash comes first (sysctl(8)). After a slash, dots
/// belong to names, for example that of a VLAN interface.
pub fn path(name: &str) -> String {
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

/// The namespace that the setting with this name belongs to.
///
/// # Errors
///
/// A [`Refusal`] for a setting that no container may have.
pub fn owner(name: &str) -> Result<Owner, Refusal> {
    let path = path(name);
    if path.split('/').any(|part| matches!(part, "" | "." | "..")) || path.contains('\0') {
        return Err(Refusal::NotAName);
    }
    match path.strip_prefix("kernel/") {
        Some("hostname") => Err(Refusal::Hostname),
        Some("domainname") => Ok(Owner::Uts),
        Some(name) if IPC.contains(&name) => Ok(Owner::Ipc),
        None if path.starts_with("net/") => Ok(Owner::Network),
        None if path.starts_with("fs/mqueue/") => Ok(Owner::Ipc),
        _ => Err(Refusal::Global),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_paths() {
        assert_eq!(path("net.ipv4.ip_forward"), "net/ipv4/ip_forward");
        assert_eq!(path("net/ipv4/conf/eth0.1/x"), "net/ipv4/conf/eth0.1/x");
        assert_eq!(path("net.ipv4.conf.eth0/1.x"), "net/ipv4/conf/eth0.1/x");
    }

    #[test]
    fn settings_belong_to_a_namespace_or_are_refused() {
        for (name, expected) in [
            ("net.ipv4.ip_forward", Ok(Owner::Network)),
            ("net/ipv4/conf/eth0.1/forwarding", Ok(Owner::Network)),
            ("kernel.shmmax", Ok(Owner::Ipc)),
            ("fs.mqueue.msg_max", Ok(Owner::Ipc)),
            ("kernel.domainname", Ok(Owner::Uts)),
            ("kernel.hostname", Err(Refusal::Hostname)),
            ("kernel.panic", Err(Refusal::Global)),
            ("vm.swappiness", Err(Refusal::Global)),
            ("kernel", Err(Refusal::Global)),
            ("net/../kernel/panic", Err(Refusal::NotAName)),
            ("net..x", Err(Refusal::NotAName)),
            ("", Err(Refusal::NotAName)),
        ] {
            assert_eq!(owner(name), expected, "{name}");
        }
    }
}

//! `linux.namespaces` and the settings inside them.

use std::fs;
use std::path::Path;

use isopod_protocol::JOIN_PREFIX;
use isopod_protocol::sysctl::{self, Owner, Refusal};
use rustix::thread::UnshareFlags;

use crate::error::{Context as _, Error, Result};
use crate::oci::{IdMapping, Linux, NamespaceKind, Spec};

/// Namespaces as `CLONE_NEW*` bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Namespaces {
    /// Namespaces that the container has of its own.
    own: u32,
    /// Namespaces that the container shares with others of the sandbox.
    joined: u32,
}

/// The namespaces that a container shares with one other container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Join {
    /// The other container's id.
    pub(crate) container: String,
    /// `CLONE_NEW*` bits.
    pub(crate) bits: u32,
}

/// Namespaces that containers can share: those of processes, of communication between them, and the
/// user namespace that these belong to.
const JOINABLE: u32 = bit(NamespaceKind::User)
    | bit(NamespaceKind::Network)
    | bit(NamespaceKind::Ipc)
    | bit(NamespaceKind::Uts)
    | bit(NamespaceKind::Pid);

/// Namespaces that the process makes by itself, after `clone3`. The root of a cgroup namespace is
/// its maker's group, and the offsets of a time namespace are set before any process enters it.
const MADE_INSIDE: u32 = bit(NamespaceKind::Cgroup) | bit(NamespaceKind::Time);

const fn bit(kind: NamespaceKind) -> u32 {
    let bit = match kind {
        NamespaceKind::Mount => libc::CLONE_NEWNS,
        NamespaceKind::Cgroup => libc::CLONE_NEWCGROUP,
        NamespaceKind::Uts => libc::CLONE_NEWUTS,
        NamespaceKind::Ipc => libc::CLONE_NEWIPC,
        NamespaceKind::User => libc::CLONE_NEWUSER,
        NamespaceKind::Pid => libc::CLONE_NEWPID,
        NamespaceKind::Network => libc::CLONE_NEWNET,
        NamespaceKind::Time => libc::CLONE_NEWTIME,
    };
    bit.cast_unsigned()
}

impl Namespaces {
    /// Reads the container's namespaces, and the namespaces that it shares with other containers.
    pub(crate) fn of(linux: &Linux) -> Result<(Self, Vec<Join>)> {
        let mut namespaces = Self { own: 0, joined: 0 };
        let mut joins: Vec<Join> = Vec::new();
        for namespace in &linux.namespaces {
            let kind = namespace.kind;
            if namespaces.has(kind) {
                let why = format!("{} is listed twice", kind.word());
                return Err(Error::invalid("linux.namespaces", why));
            }
            if namespace.path.as_os_str().is_empty() {
                namespaces.own |= bit(kind);
                continue;
            }
            let path = namespace.path.to_string_lossy();
            let container = path.strip_prefix(JOIN_PREFIX).filter(|_| bit(kind) & JOINABLE != 0);
            let Some(container) = container else {
                let why = format!("{path} cannot be joined from inside a sandbox");
                let field = format!("linux.namespaces[{}].path", kind.word());
                return Err(Error::invalid(field, why));
            };
            namespaces.joined |= bit(kind);
            match joins.iter_mut().find(|join| join.container == container) {
                Some(join) => join.bits |= bit(kind),
                None => joins.push(Join { container: container.to_owned(), bits: bit(kind) }),
            }
        }
        if !namespaces.is_own(NamespaceKind::Mount) {
            return Err(Error::invalid("linux.namespaces", "a container needs one of type mount"));
        }
        Ok((namespaces, joins))
    }

    /// Returns true for a namespace of the container's own, or one that it shares.
    pub(crate) fn has(self, kind: NamespaceKind) -> bool {
        (self.own | self.joined) & bit(kind) != 0
    }

    /// Returns true for a namespace of the container's own.
    pub(crate) fn is_own(self, kind: NamespaceKind) -> bool {
        self.own & bit(kind) != 0
    }

    /// Flags of the namespaces that `clone3` makes.
    pub(crate) fn clone_flags(self) -> u64 {
        u64::from(self.own & !MADE_INSIDE)
    }

    /// Flags of the namespaces that a further process enters by itself. The process is cloned into
    /// the pid namespace.
    pub(crate) fn join_flags(self) -> u32 {
        (self.own | self.joined) & !bit(NamespaceKind::Pid)
    }
}

/// Refuses settings that need a namespace which the container does not have.
pub(crate) fn check(spec: &Spec, linux: &Linux, namespaces: Namespaces) -> Result<()> {
    let set = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    if !namespaces.has(NamespaceKind::Uts) {
        for (field, text) in [("hostname", &spec.hostname), ("domainname", &spec.domainname)] {
            if set(text) {
                return Err(Error::invalid(field, "needs a namespace of type uts"));
            }
        }
    }
    for (_, field, maps) in mappings(linux) {
        let given = !maps.is_empty();
        if given && !namespaces.has(NamespaceKind::User) {
            return Err(Error::invalid(field, "needs a namespace of type user"));
        }
        if namespaces.is_own(NamespaceKind::User) && !given {
            return Err(Error::invalid(field, "a namespace of type user needs mappings"));
        }
    }
    for clock in linux.time_offsets.keys() {
        let field = format!("linux.timeOffsets.{clock}");
        if !matches!(clock.as_str(), "monotonic" | "boottime") {
            return Err(Error::invalid(field, "the clocks are monotonic and boottime"));
        }
        if !namespaces.has(NamespaceKind::Time) {
            return Err(Error::invalid(field, "needs a namespace of type time"));
        }
    }
    for key in linux.sysctl.keys() {
        check_sysctl(key, namespaces)?;
    }
    Ok(())
}

/// Refuses kernel settings that belong to no namespace, because they would change the whole guest.
fn check_sysctl(key: &str, namespaces: Namespaces) -> Result<()> {
    let refusal = |why: &str| Err(Error::invalid(format!("linux.sysctl[{key:?}]"), why));
    let kind = match sysctl::owner(key) {
        Ok(Owner::Network) => NamespaceKind::Network,
        Ok(Owner::Ipc) => NamespaceKind::Ipc,
        Ok(Owner::Uts) => NamespaceKind::Uts,
        Err(Refusal::NotAName) => return refusal("not the name of a kernel setting"),
        Err(Refusal::Hostname) => return refusal("the field hostname sets it"),
        Err(Refusal::Global) => return refusal("not a setting of a namespace"),
    };
    if namespaces.has(kind) {
        return Ok(());
    }
    refusal(&format!("needs a namespace of type {}", kind.word()))
}

/// The id mappings: the file in `/proc/<pid>`, the field, and the mappings themselves.
fn mappings(linux: &Linux) -> [(&'static str, &'static str, &[IdMapping]); 2] {
    [
        ("uid_map", "linux.uidMappings", &linux.uid_mappings),
        ("gid_map", "linux.gidMappings", &linux.gid_mappings),
    ]
}

/// Writes `/proc/<pid>/{uid,gid}_map` of a process that was just cloned into a user namespace.
pub(crate) fn map_ids(pid: i32, linux: &Linux) -> Result<()> {
    for (file, field, maps) in mappings(linux) {
        let text = id_map(maps);
        fs::write(format!("/proc/{pid}/{file}"), text).context(|| format!("apply {field}"))?;
    }
    Ok(())
}

/// Refuses mappings that are not those of the shared user namespace, which `pid` is in. None at all
/// are fine.
pub(super) fn check_shared_ids(pid: i32, container: &str, linux: &Linux) -> Result<()> {
    for (file, field, maps) in mappings(linux).into_iter().filter(|(_, _, maps)| !maps.is_empty()) {
        let path = format!("/proc/{pid}/{file}");
        let real = fs::read_to_string(&path).context(|| format!("read {path}"))?;
        let fields = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        if fields(&real) != fields(&id_map(maps)) {
            let why =
                format!("not that of container {container:?}, whose user namespace it shares");
            return Err(Error::invalid(field, why));
        }
    }
    Ok(())
}

fn id_map(maps: &[IdMapping]) -> String {
    maps.iter().map(|map| format!("{} {} {}\n", map.container_id, map.host_id, map.size)).collect()
}

/// Makes the remaining namespaces of the calling process, and applies the settings inside all of
/// them. Runs in the container's first process, which still sees the guest's file systems.
pub(crate) fn set_up(spec: &Spec, linux: &Linux, namespaces: Namespaces) -> Result<()> {
    if namespaces.has(NamespaceKind::Cgroup) {
        unshare(NamespaceKind::Cgroup)?;
    }
    if namespaces.has(NamespaceKind::Time) {
        // The time namespace takes effect with execve.
        unshare(NamespaceKind::Time)?;
        for (clock, offset) in &linux.time_offsets {
            let (secs, nanos) = (offset.secs, offset.nanosecs);
            fs::write("/proc/self/timens_offsets", format!("{clock} {secs} {nanos}\n"))
                .context(|| format!("apply linux.timeOffsets.{clock}"))?;
        }
    }
    if namespaces.is_own(NamespaceKind::Network) {
        crate::network::loopback_up()?;
    }
    if let Some(name) = spec.hostname.as_ref().filter(|name| !name.is_empty()) {
        rustix::system::sethostname(name.as_bytes()).context(|| format!("hostname {name:?}"))?;
    }
    if let Some(name) = spec.domainname.as_ref().filter(|name| !name.is_empty()) {
        rustix::system::setdomainname(name.as_bytes())
            .context(|| format!("domainname {name:?}"))?;
    }
    // /proc/sys of the guest shows the settings of the opener's namespaces.
    for (key, value) in &linux.sysctl {
        let path = Path::new("/proc/sys").join(sysctl::path(key));
        let field = || format!("linux.sysctl[{key:?}]");
        match fs::write(path, value) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::invalid(field(), "not a setting of the guest's kernel"));
            }
            written => written.context(|| format!("set {} to {value:?}", field()))?,
        }
    }
    Ok(())
}

fn unshare(kind: NamespaceKind) -> Result<()> {
    let flags = UnshareFlags::from_bits_retain(bit(kind));
    // SAFETY: a cgroup or time namespace takes no descriptors or memory away from anybody.
    let result = unsafe { rustix::thread::unshare_unsafe(flags) };
    result.context(|| format!("make a namespace of type {}", kind.word()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linux(json: &str) -> Linux {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn types_become_bits() {
        let linux =
            linux(r#"{"namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "cgroup"}]}"#);
        let (namespaces, joins) = Namespaces::of(&linux).unwrap();
        assert_eq!(joins, []);
        assert_eq!(namespaces.clone_flags(), 0x2002_0000);
        assert_eq!(namespaces.join_flags(), 0x0202_0000);
    }

    #[test]
    fn paths_and_a_missing_mount_namespace_are_refused() {
        let path = linux(r#"{"namespaces": [{"type": "network", "path": "/run/netns/x"}]}"#);
        let e = Namespaces::of(&path).unwrap_err();
        assert!(e.message.starts_with("linux.namespaces[network].path: /run/netns/x"), "{e}");
        let e = Namespaces::of(&linux(r#"{"namespaces": [{"type": "pid"}]}"#)).unwrap_err();
        assert!(e.message.contains("mount"), "{e}");
    }

    #[test]
    fn those_of_other_containers_are_joined() {
        let linux = linux(
            r#"{"namespaces": [{"type": "mount"}, {"type": "pid"},
                {"type": "network", "path": "container:a"}, {"type": "uts", "path": "container:b"},
                {"type": "ipc", "path": "container:a"}]}"#,
        );
        let (namespaces, joins) = Namespaces::of(&linux).unwrap();
        assert_eq!(namespaces.clone_flags(), 0x2002_0000);
        assert_eq!(namespaces.join_flags(), 0x4c02_0000);
        assert!(namespaces.has(NamespaceKind::Uts) && !namespaces.is_own(NamespaceKind::Uts));
        let join = |container: &str, bits| Join { container: container.to_owned(), bits };
        assert_eq!(joins, [join("a", 0x4800_0000), join("b", 0x0400_0000)]);
        for kind in ["mount", "time", "cgroup"] {
            let json =
                format!(r#"{{"namespaces": [{{"type": "{kind}", "path": "container:a"}}]}}"#);
            let e = Namespaces::of(&serde_json::from_str(&json).unwrap()).unwrap_err();
            assert!(e.message.contains("cannot be joined"), "{e}");
        }
    }

    #[test]
    fn a_shared_user_namespace_has_the_mappings_of_its_owner() {
        let mut linux = linux(
            r#"{"namespaces": [{"type": "mount"}, {"type": "user", "path": "container:a"}]}"#,
        );
        let (namespaces, _) = Namespaces::of(&linux).unwrap();
        assert!(namespaces.has(NamespaceKind::User) && !namespaces.is_own(NamespaceKind::User));
        let pid = std::process::id().cast_signed();
        check_shared_ids(pid, "a", &linux).unwrap();
        linux.uid_mappings =
            serde_json::from_str(r#"[{"containerID": 7, "hostID": 9, "size": 3}]"#).unwrap();
        let e = check_shared_ids(pid, "a", &linux).unwrap_err();
        assert!(e.message.starts_with("linux.uidMappings: not that of container"), "{e}");
    }

    #[test]
    fn sysctls_of_the_whole_guest_are_refused() {
        let namespaces = Namespaces { own: bit(NamespaceKind::Network), joined: 0 };
        assert!(check_sysctl("net.ipv4.ip_forward", namespaces).is_ok());
        assert!(check_sysctl("net/ipv4/conf/eth0.1/forwarding", namespaces).is_ok());
        for key in ["kernel.panic", "kernel.shmmax", "net/../kernel/panic", "net..x", "vm.x"] {
            assert!(check_sysctl(key, namespaces).is_err(), "{key}");
        }
    }
}

//! Propagation of the host's later mounts into what a container shares (mount_namespaces(7)).

use oci_spec::runtime::{Mount, Spec};
use serde::{Deserialize, Serialize};

/// The propagation of a shared tree on the host's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Propagation {
    /// The tree follows the host's mounts and unmounts below the source. Other runtimes have this
    /// too if config.json names no propagation.
    Slave,
    /// The mounts below the source follow the host, and the source's own mount follows nothing.
    PrivateTop,
    /// The tree stays as it was when the container was created, and keeps no mount of the host
    /// busy.
    Private,
}

impl Propagation {
    /// The propagation of the container's root.
    pub fn of_root(spec: &Spec) -> Self {
        let asked = spec.linux().as_ref().and_then(|linux| linux.rootfs_propagation().as_deref());
        match asked {
            Some("private" | "rprivate" | "unbindable" | "runbindable") => Self::Private,
            // Shared mounts receive as slaves do. A mount of the guest cannot reach the host.
            _ => Self::Slave,
        }
    }

    /// The propagation of a bind mount: that of the root, unless its options have another.
    pub(super) fn of_bind(spec: &Spec, mount: &Mount) -> Self {
        let options = mount.options().iter().flatten().map(String::as_str);
        options.fold(Self::of_root(spec), |now, option| match option {
            "rprivate" | "runbindable" => Self::Private,
            // A tree that is private already has no master to be a slave of.
            "private" | "unbindable" if now == Self::Slave => Self::PrivateTop,
            _ => now,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(root: &str, options: &[&str]) -> Propagation {
        let spec = json!({"ociVersion": "1.0.2", "linux": {"rootfsPropagation": root}});
        let mount =
            json!({"destination": "/d", "type": "bind", "source": "/s", "options": options});
        let spec = serde_json::from_value(spec).unwrap();
        Propagation::of_bind(&spec, &serde_json::from_value(mount).unwrap())
    }

    #[test]
    fn a_mount_follows_the_host_unless_it_is_private() {
        for options in [&["rbind"][..], &["rbind", "rslave"], &["bind", "slave", "ro"]] {
            assert_eq!(of("", options), Propagation::Slave);
            assert_eq!(of("shared", options), Propagation::Slave);
            assert_eq!(of("rprivate", options), Propagation::Private);
        }
        assert_eq!(of("", &["rbind", "rprivate"]), Propagation::Private);
        assert_eq!(of("rslave", &["rbind", "rprivate", "slave"]), Propagation::Private);
        assert_eq!(of("", &["rbind", "private"]), Propagation::PrivateTop);
        assert_eq!(of("", &["rbind", "private", "runbindable"]), Propagation::Private);
    }
}

//! Mount options of config.json, as fstab(5) and the runtime specification spell them.
//!
//! The kernel's mount calls take three kinds of options separately: attributes of the mount
//! (`MOUNT_ATTR_*`), its propagation, and options of the file system. [`MountOptions`] keeps them
//! apart. An option without effect is refused.

use isopod_protocol::mount_option::{NEUTRAL, REFUSED};
use rustix::mount::{MountAttrFlags, MountPropagationFlags};

use crate::error::{self, Error};
use crate::oci::Mount;

/// The options of one mount.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct MountOptions {
    /// A bind mount; recursive if true.
    pub(crate) bind: Option<bool>,
    /// Attributes of the mount itself.
    pub(crate) set: MountAttr,
    /// Attributes of the mount and of everything below it, set and cleared.
    pub(crate) recursive: MountAttr,
    /// Propagation types in their order, and whether each is recursive.
    pub(crate) propagation: Vec<(MountPropagationFlags, bool)>,
    /// Options of the file system: flags and `key=value` pairs.
    pub(crate) data: Vec<String>,
    /// Copy the image's files at the destination into the new tmpfs.
    pub(crate) copy_up: bool,
}

/// Attributes to set and to clear, as `mount_setattr` takes them.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MountAttr {
    pub(crate) set: u64,
    pub(crate) clear: u64,
}

const RDONLY: u64 = MountAttrFlags::MOUNT_ATTR_RDONLY.bits() as u64;
const NOSUID: u64 = MountAttrFlags::MOUNT_ATTR_NOSUID.bits() as u64;
const NODEV: u64 = MountAttrFlags::MOUNT_ATTR_NODEV.bits() as u64;
const NOEXEC: u64 = MountAttrFlags::MOUNT_ATTR_NOEXEC.bits() as u64;
const NODIRATIME: u64 = MountAttrFlags::MOUNT_ATTR_NODIRATIME.bits() as u64;
const NOSYMFOLLOW: u64 = 0x0020_0000;
/// Mask of the access time attribute, a field with three values. `relatime` is 0.
const ATIME: u64 = MountAttrFlags::MOUNT_ATTR__ATIME.bits() as u64;
const NOATIME: u64 = MountAttrFlags::MOUNT_ATTR_NOATIME.bits() as u64;
const STRICTATIME: u64 = MountAttrFlags::MOUNT_ATTR_STRICTATIME.bits() as u64;

impl MountAttr {
    pub(crate) const READ_ONLY: Self = Self { set: RDONLY, clear: 0 };

    pub(crate) fn is_empty(self) -> bool {
        self == Self::default()
    }

    fn apply(&mut self, other: Self) {
        self.set = self.set & !other.clear | other.set;
        self.clear = self.clear & !other.set | other.clear;
    }

    pub(crate) fn read_only(self) -> bool {
        self.set & RDONLY != 0
    }

    /// Clears the read-only attribute and returns whether it was set.
    pub(crate) fn take_read_only(&mut self) -> bool {
        let read_only = self.read_only();
        self.set &= !RDONLY;
        read_only
    }
}

impl MountOptions {
    /// Reads the options of a mount. The error names the first option that cannot be honoured.
    pub(crate) fn of(mount: &Mount) -> Result<Self, String> {
        let mut parsed = Self::default();
        if mount.kind.as_deref() == Some("bind") {
            parsed.bind = Some(false);
        }
        for option in &mount.options {
            parsed.add(option)?;
        }
        if parsed.bind.is_some() {
            if let Some(option) = parsed.data.first() {
                return Err(format!("{option:?} has no meaning for a bind mount"));
            }
            // A bind mount changes only the requested attributes and keeps the source's others.
            parsed.set.clear &= ATIME;
        }
        if parsed.copy_up && mount.kind.as_deref() != Some("tmpfs") {
            return Err("\"tmpcopyup\" is only for tmpfs".into());
        }
        Ok(parsed)
    }

    fn add(&mut self, option: &str) -> Result<(), String> {
        if let Some(attr) = attribute(option) {
            self.set.apply(attr);
            return Ok(());
        }
        if let Some(attr) = option.strip_prefix('r').and_then(attribute) {
            self.recursive.apply(attr);
            return Ok(());
        }
        if let Some(propagation) = propagation(option) {
            self.propagation.push(propagation);
            return Ok(());
        }
        match option {
            "bind" => self.bind = Some(self.bind.unwrap_or(false)),
            "rbind" => self.bind = Some(true),
            "tmpcopyup" => self.copy_up = true,
            neutral if NEUTRAL.contains(&neutral) => {}
            refused if REFUSED.contains(&refused) => {
                return Err(format!("{option:?} is not supported in a sandbox"));
            }
            data => self.data.push(data.to_owned()),
        }
        Ok(())
    }
}

fn attribute(option: &str) -> Option<MountAttr> {
    let set = |bits| Some(MountAttr { set: bits, clear: 0 });
    let clear = |bits| Some(MountAttr { set: 0, clear: bits });
    // The kernel wants the whole field cleared when a value of it is set.
    let atime = |bits| Some(MountAttr { set: bits, clear: ATIME });
    match option {
        "ro" => set(RDONLY),
        "rw" => clear(RDONLY),
        "nosuid" => set(NOSUID),
        "suid" => clear(NOSUID),
        "nodev" => set(NODEV),
        "dev" => clear(NODEV),
        "noexec" => set(NOEXEC),
        "exec" => clear(NOEXEC),
        "nodiratime" => set(NODIRATIME),
        "diratime" => clear(NODIRATIME),
        "nosymfollow" => set(NOSYMFOLLOW),
        "symfollow" => clear(NOSYMFOLLOW),
        "noatime" => atime(NOATIME),
        "strictatime" | "norelatime" => atime(STRICTATIME),
        "relatime" | "atime" | "nostrictatime" => atime(0),
        _ => None,
    }
}

/// A propagation type such as `private` or `rshared`, and whether it is recursive.
pub(crate) fn propagation(option: &str) -> Option<(MountPropagationFlags, bool)> {
    let one = |name: &str| match name {
        "private" => Some(MountPropagationFlags::PRIVATE),
        "shared" => Some(MountPropagationFlags::SHARED),
        "slave" => Some(MountPropagationFlags::DOWNSTREAM),
        "unbindable" => Some(MountPropagationFlags::UNBINDABLE),
        _ => None,
    };
    match one(option) {
        Some(flags) => Some((flags, false)),
        None => one(option.strip_prefix('r')?).map(|flags| (flags, true)),
    }
}

/// The propagation type of `linux.rootfsPropagation`, and whether it is recursive.
pub(crate) fn rootfs_propagation(name: &str) -> error::Result<(MountPropagationFlags, bool)> {
    propagation(name)
        .ok_or_else(|| Error::invalid("linux.rootfsPropagation", format!("{name:?} is unknown")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(kind: &str, options: &[&str]) -> Result<MountOptions, String> {
        let json = serde_json::json!({"destination": "/d", "type": kind, "options": options});
        MountOptions::of(&serde_json::from_value(json).unwrap())
    }

    #[test]
    fn attributes_propagation_and_data_are_told_apart() {
        let options =
            of("tmpfs", &["nosuid", "noexec", "mode=1777", "rprivate", "size=64k"]).unwrap();
        assert_eq!(options.set, MountAttr { set: NOSUID | NOEXEC, clear: 0 });
        assert_eq!(options.data, ["mode=1777", "size=64k"]);
        assert_eq!(options.propagation, [(MountPropagationFlags::PRIVATE, true)]);
        assert_eq!(options.bind, None);
    }

    #[test]
    fn the_last_of_two_opposites_wins() {
        assert!(!of("tmpfs", &["ro", "rw"]).unwrap().set.read_only());
        assert!(of("tmpfs", &["rw", "ro"]).unwrap().set.read_only());
        let atime = of("tmpfs", &["noatime", "strictatime"]).unwrap().set;
        assert_eq!(atime.set, STRICTATIME);
        assert_eq!(atime.clear, ATIME);
    }

    #[test]
    fn every_name_that_the_host_lets_through_has_a_meaning() {
        use isopod_protocol::mount_option::{ATTRIBUTES, PROPAGATION};
        for name in ATTRIBUTES {
            assert!(attribute(name).is_some(), "{name}");
        }
        for name in PROPAGATION {
            assert!(propagation(name).is_some(), "{name}");
        }
    }

    #[test]
    fn recursive_attributes_are_kept_apart() {
        let options = of("none", &["rbind", "rro", "rexec"]).unwrap();
        assert_eq!(options.bind, Some(true));
        assert!(options.set.is_empty());
        assert_eq!(options.recursive, MountAttr { set: RDONLY, clear: NOEXEC });
    }

    #[test]
    fn what_has_no_effect_is_refused() {
        assert!(of("bind", &["mode=755"]).unwrap_err().contains("mode=755"));
        assert!(of("proc", &["tmpcopyup"]).unwrap_err().contains("tmpcopyup"));
        assert!(of("bind", &["idmap"]).unwrap_err().contains("idmap"));
    }

    #[test]
    fn plain_words_that_undo_nothing_leave_a_bind_as_its_source() {
        assert!(of("bind", &["rbind", "rw", "suid"]).unwrap().set.is_empty());
    }
}

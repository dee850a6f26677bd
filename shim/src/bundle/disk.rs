//! Block devices of the host that a container gets: entries of `linux.devices`, and sources of
//! mounts of a file system.
//!
//! A privileged container lists every device of its host. So none of its list is given to it: what
//! it may do in its microVM is no right on the host.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Mount, Spec};
use rustix::fs::{major, minor};
use serde::{Deserialize, Serialize};

use super::bind::{has_option, is_bind};
use crate::error::{Error, Explain, Result};

/// Types of mounts whose source may be a block device of the host. The guest kernel's ext4 serves
/// them all.
pub(super) const FILE_SYSTEMS: [&str; 3] = ["ext4", "ext3", "ext2"];

/// Major number of loop devices, of which each kernel has its own.
const LOOP_MAJOR: u32 = 7;

/// Major numbers that a kernel gives to drivers without a number of their own. The guest's disks
/// have such a number.
const DYNAMIC_MAJORS: std::ops::RangeInclusive<i64> = 234..=254;

/// Source of a mount of a disk, until the disk has a name in the guest. The disk's position in
/// [`crate::bundle::Bundle::disks`] follows.
const SOURCE_PREFIX: &str = "disk:";

/// A block device of the host that the guest gets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The field of config.json that asks for it.
    pub field: DiskField,
    /// Path for messages: in the container for a device, on the host for a mount.
    pub path: PathBuf,
    /// Major number on the host.
    pub major: u32,
    /// Minor number on the host.
    pub minor: u32,
    /// Letters of the container's access, out of `rwm`.
    pub access: String,
}

/// A field of config.json that asks for a block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskField {
    /// The entry of `linux.devices` at this position.
    Device(usize),
    /// The source of the mount at this position in `mounts`.
    Mount(usize),
}

/// A disk in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestDisk {
    /// Major number in the guest.
    pub major: u32,
    /// Minor number in the guest.
    pub minor: u32,
    /// Name of its node in the guest's `/dev`.
    pub name: String,
}

impl Disk {
    /// Tells whether the guest may only read.
    pub fn read_only(&self) -> bool {
        !self.access.contains('w')
    }
}

/// Finds the block devices of the host that a container asks for.
///
/// # Errors
///
/// If the host has no such device, or `linux.resources.devices` lets the container neither read nor
/// write it.
pub(super) fn disks(bundle: &Path, spec: &Spec) -> Result<Vec<Disk>> {
    let mut disks = Vec::new();
    if let Some(linux) = spec.linux().as_ref().filter(|linux| !is_privileged(linux)) {
        for (index, device) in linux.devices().iter().flatten().enumerate() {
            disks.extend(of_device(index, device, rules(linux))?);
        }
    }
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        if is_of_disk(mount) {
            disks.push(of_mount(bundle, index, mount)?);
        }
    }
    Ok(disks)
}

/// Tells whether a mount is a file system on a block device.
pub(super) fn is_of_disk(mount: &Mount) -> bool {
    !is_bind(mount) && mount.typ().as_deref().is_some_and(|kind| FILE_SYSTEMS.contains(&kind))
}

fn of_device(
    index: usize,
    device: &LinuxDevice,
    rules: &[LinuxDeviceCgroup],
) -> Result<Option<Disk>> {
    if device.typ() != LinuxDeviceType::B {
        return Ok(None);
    }
    let path = device.path().clone();
    let refused = |why: &str| {
        Err(Error::new(format!(
            "linux.devices[{}]: the microVM has no block device {}:{}: {why}",
            path.display(),
            device.major(),
            device.minor()
        )))
    };
    let numbers = (u32::try_from(device.major()), u32::try_from(device.minor()));
    let (Ok(major), Ok(minor)) = numbers else { return refused("its number is out of range") };
    if !has_content(major, minor) {
        // A loop device without a file is the guest's own.
        return if major == LOOP_MAJOR {
            Ok(None)
        } else {
            refused("the host has no such device, or it is empty")
        };
    }
    let access = access(rules, major, minor);
    if !access.contains(['r', 'w']) {
        return refused("linux.resources.devices lets the container neither read nor write it");
    }
    Ok(Some(Disk { field: DiskField::Device(index), path, major, minor, access }))
}

fn of_mount(bundle: &Path, index: usize, mount: &Mount) -> Result<Disk> {
    let name = format!("mounts[{index}] ({})", mount.destination().display());
    let source = mount.source().as_deref().unwrap_or(Path::new(""));
    let source = fs::canonicalize(bundle.join(source))
        .explain(|| format!("{name}: cannot find its source {}", source.display()))?;
    let what = || format!("{name}: cannot read its source {}", source.display());
    let found = fs::metadata(&source).explain(what)?;
    if !found.file_type().is_block_device() {
        return Err(Error::new(format!(
            "{name}: its source {} is not a block device",
            source.display()
        )));
    }
    let access = if has_option(mount, "ro") { "r" } else { "rw" };
    Ok(Disk {
        field: DiskField::Mount(index),
        path: source,
        major: major(found.rdev()),
        minor: minor(found.rdev()),
        access: access.to_owned(),
    })
}

/// Tells whether the host has this block device, with at least a sector.
fn has_content(major: u32, minor: u32) -> bool {
    let sectors = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/size"));
    sectors.is_ok_and(|sectors| sectors.trim().parse::<u64>().is_ok_and(|sectors| sectors > 0))
}

/// Tells whether the rules allow every access to every device, as those of privileged containers.
fn is_privileged(linux: &Linux) -> bool {
    let rules = rules(linux);
    let last = rules.iter().rposition(is_of_all);
    last.is_some_and(|last| rules[last..].iter().all(LinuxDeviceCgroup::allow))
}

fn rules(linux: &Linux) -> &[LinuxDeviceCgroup] {
    let resources = linux.resources().as_ref();
    resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default()
}

fn is_of_all(rule: &LinuxDeviceCgroup) -> bool {
    rule.typ().is_none_or(|kind| kind == LinuxDeviceType::A)
}

/// Letters of the access that the rules allow to a block device. The last rule with a letter decides
/// about it.
fn access(rules: &[LinuxDeviceCgroup], major: u32, minor: u32) -> String {
    let meets = |number: Option<i64>, own: u32| {
        number.is_none_or(|number| number == -1 || number == i64::from(own))
    };
    let mut allowed = String::new();
    for letter in ['r', 'w', 'm'] {
        let names = |rule: &&LinuxDeviceCgroup| {
            is_of_all(rule)
                || (rule.typ() == Some(LinuxDeviceType::B)
                    && meets(rule.major(), major)
                    && meets(rule.minor(), minor)
                    && rule.access().as_ref().is_none_or(|access| access.contains(letter)))
        };
        if rules.iter().rev().find(names).is_some_and(LinuxDeviceCgroup::allow) {
            allowed.push(letter);
        }
    }
    allowed
}

/// The source of a mount of the disk at this position in [`crate::bundle::Bundle::disks`].
pub(super) fn source_of(index: usize) -> PathBuf {
    format!("{SOURCE_PREFIX}{index}").into()
}

/// Takes numbers of the host's block devices out of the specification of a guest, where they mean
/// other devices. Devices of `disks` keep theirs, until [`place`].
pub(super) fn forget_others(spec: &mut Spec, disks: &[Disk]) {
    let Some(linux) = spec.linux_mut() else { return };
    let privileged = is_privileged(linux);
    let kept = |index| disks.iter().any(|disk| disk.field == DiskField::Device(index));
    for (index, device) in linux.devices_mut().iter_mut().flatten().enumerate() {
        let other = device.typ() == LinuxDeviceType::B && !kept(index);
        if other && DYNAMIC_MAJORS.contains(&device.major()) {
            // Without a driver: to open it fails, as with any other device of the host.
            device.set_major(0);
            device.set_minor(0);
        }
    }
    let rules =
        linux.resources_mut().as_mut().and_then(|resources| resources.devices_mut().as_mut());
    let Some(rules) = rules.filter(|_| !privileged) else { return };
    let own_loop = |major: i64, minor: Option<i64>| {
        major == i64::from(LOOP_MAJOR)
            && !disks.iter().any(|disk| {
                disk.major == LOOP_MAJOR && minor.is_none_or(|n| n == i64::from(disk.minor))
            })
    };
    rules.retain(|rule| {
        let numbered = rule.major().filter(|major| *major != -1);
        !rule.allow()
            || rule.typ() != Some(LinuxDeviceType::B)
            || numbered.is_none_or(|major| own_loop(major, rule.minor()))
    });
}

/// Puts the guest's numbers and names of the disks into the specification of a guest, and allows
/// the container its access. `placed` are the disks in the guest, in the order of `disks`.
pub(crate) fn place(spec: &mut Spec, disks: &[Disk], placed: &[GuestDisk]) {
    for (index, (disk, guest)) in disks.iter().zip(placed).enumerate() {
        match disk.field {
            DiskField::Mount(_) => {
                let source = Some(source_of(index));
                let mounts = spec.mounts_mut().iter_mut().flatten();
                for mount in mounts.filter(|mount| *mount.source() == source) {
                    mount.set_source(Some(Path::new("/dev").join(&guest.name)));
                }
            }
            DiskField::Device(index) => {
                let Some(linux) = spec.linux_mut() else { continue };
                let device = linux.devices_mut().as_mut().and_then(|all| all.get_mut(index));
                if let Some(device) = device {
                    device.set_major(guest.major.into());
                    device.set_minor(guest.minor.into());
                }
                let mut rule = LinuxDeviceCgroup::default();
                rule.set_allow(true);
                rule.set_typ(Some(LinuxDeviceType::B));
                rule.set_major(Some(guest.major.into()));
                rule.set_minor(Some(guest.minor.into()));
                rule.set_access(Some(disk.access.clone()));
                let resources = linux.resources_mut().get_or_insert_default();
                resources.devices_mut().get_or_insert_default().push(rule);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(devices: serde_json::Value, rules: serde_json::Value) -> Spec {
        serde_json::from_value(json!({ "ociVersion": "1.0.2",
            "linux": { "devices": devices, "resources": { "devices": rules } } }))
        .unwrap()
    }

    fn rule(allow: bool, numbers: [i64; 2], access: &str) -> serde_json::Value {
        let [major, minor] = numbers;
        json!({ "allow": allow, "type": "b", "major": major, "minor": minor, "access": access })
    }

    #[test]
    fn the_last_rule_for_a_letter_decides() {
        let spec = spec(
            json!([]),
            json!([
                { "allow": false, "access": "rwm" },
                { "allow": true, "type": "b", "access": "m" },
                rule(true, [8, -1], "rw"),
                rule(false, [8, 1], "w"),
                { "allow": true, "type": "c", "major": 9, "minor": 0, "access": "rwm" },
            ]),
        );
        let linux = spec.linux().as_ref().unwrap();
        for (numbers, expected) in [((8, 0), "rwm"), ((8, 1), "rm"), ((9, 0), "m")] {
            assert_eq!(access(rules(linux), numbers.0, numbers.1), expected, "{numbers:?}");
        }
        assert_eq!(access(&[], 8, 0), "");
        assert!(!is_privileged(linux));
    }

    #[test]
    fn a_device_that_the_host_lacks_or_nobody_may_use_is_refused() {
        let device = json!({ "path": "/dev/x", "type": "b", "major": 8, "minor": 1048575 });
        let allowed = spec(json!([device]), json!([rule(true, [8, 1048575], "rwm")]));
        let error = disks(Path::new("/"), &allowed).unwrap_err().message;
        assert!(
            error.starts_with("linux.devices[/dev/x]: the microVM has no block device 8:1048575")
        );
        // A privileged container lists every device, and gets none.
        let privileged = spec(json!([device]), json!([{ "allow": true, "access": "rwm" }]));
        assert_eq!(disks(Path::new("/"), &privileged).unwrap(), []);
        // Without a file a loop device is the guest's own.
        let device = json!({ "path": "/dev/l", "type": "b", "major": 7, "minor": 1048575 });
        let own = spec(json!([device]), json!([]));
        assert_eq!(disks(Path::new("/"), &own).unwrap(), []);
    }

    #[test]
    fn numbers_of_the_host_do_not_reach_disks_of_the_guest() {
        let device = |path: &str, major: i64, minor: i64| json!({ "path": path, "type": "b", "major": major, "minor": minor });
        let rules = json!([
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "b", "access": "m" },
            rule(true, [254, 0], "rw"),
            rule(true, [7, 3], "rwm"),
        ]);
        let mut spec = spec(json!([device("/dev/a", 254, 0), device("/dev/b", 253, 7)]), rules);
        let disk = Disk {
            field: DiskField::Device(0),
            path: "/dev/a".into(),
            major: 254,
            minor: 0,
            access: "r".to_owned(),
        };
        let disks = [disk];
        forget_others(&mut spec, &disks);
        let guest = GuestDisk { major: 254, minor: 32, name: "vdc".to_owned() };
        place(&mut spec, &disks, &[guest]);
        let linux = spec.linux().as_ref().unwrap();
        let numbers = linux.devices().iter().flatten().map(|d| (d.major(), d.minor()));
        assert_eq!(numbers.collect::<Vec<_>>(), [(254, 32), (0, 0)]);
        let allowed = |numbers: (u32, u32)| access(super::rules(linux), numbers.0, numbers.1);
        assert_eq!([(254, 0), (254, 32), (7, 3)].map(allowed), ["m", "rm", "rwm"]);
    }
}

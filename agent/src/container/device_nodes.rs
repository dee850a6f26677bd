//! Device nodes and links in the container's `/dev`.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, Uid, chmodat, chownat, makedev, mknodat, statat,
};
use rustix::io::Errno;

use super::mounts;
use super::path::{self, Missing};
use crate::error::{Context as _, Error, Result};
use crate::oci::{Device, DeviceKind};

/// Major and minor numbers of the devices that every container has (runtime-spec, "Default
/// Devices"). `/dev/console` is a bind mount of the terminal, and `/dev/ptmx` a link.
const DEFAULTS: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

struct Node {
    path: PathBuf,
    kind: FileType,
    device: u64,
    mode: u32,
    uid: u32,
    gid: u32,
}

/// Refuses devices with a wrong path, type or number.
pub(crate) fn check(device: &Device) -> Result<()> {
    node_of(device).map(|_| ())
}

/// Devices of the kernel itself that any kernel may have, by type and number: memory devices,
/// terminals, TUN/TAP, FUSE, loop devices. Any other number means a device of the host, or a
/// private device of the guest.
const PORTABLE: [(FileType, u32, std::ops::RangeInclusive<u32>); 8] = [
    (FileType::CharacterDevice, 1, 0..=u32::MAX),
    (FileType::CharacterDevice, 5, 0..=2),
    (FileType::CharacterDevice, 10, 200..=200),
    (FileType::CharacterDevice, 10, 203..=203),
    (FileType::CharacterDevice, 10, 229..=229),
    (FileType::CharacterDevice, 10, 237..=237),
    (FileType::CharacterDevice, 136, 0..=u32::MAX),
    (FileType::BlockDevice, 7, 0..=u32::MAX),
];

/// Refuses a device that the guest does not have. A node for it would open nothing, or another
/// device.
pub(crate) fn check_present(device: &Device) -> Result<()> {
    let node = node_of(device)?;
    let kind = match node.kind {
        FileType::CharacterDevice => "char",
        FileType::BlockDevice => "block",
        _ => return Ok(()),
    };
    let (major, minor) = (rustix::fs::major(node.device), rustix::fs::minor(node.device));
    let portable = PORTABLE.iter().any(|(kind, number, minors)| {
        (*kind, *number) == (node.kind, major) && minors.contains(&minor)
    });
    // /sys/dev does not list pseudo-terminals.
    let there = major == 136 || Path::new(&format!("/sys/dev/{kind}/{major}:{minor}")).exists();
    // Every other block device is a disk that the host has given to this container.
    if (portable || node.kind == FileType::BlockDevice) && there {
        return Ok(());
    }
    let why = format!(
        "the microVM has no {kind} device {major}:{minor}, and devices of the host cannot be \
         reached from it"
    );
    Err(Error::invalid(format!("linux.devices[{}]", device.path.display()), why))
}

fn node_of(device: &Device) -> Result<Node> {
    let field = || format!("linux.devices[{}]", device.path.display());
    if !device.path.is_absolute() || device.path.file_name().is_none() {
        return Err(Error::invalid(field(), "the path is not absolute"));
    }
    let kind = match device.kind {
        DeviceKind::Block => FileType::BlockDevice,
        DeviceKind::Char | DeviceKind::Unbuffered => FileType::CharacterDevice,
        DeviceKind::Fifo => FileType::Fifo,
        DeviceKind::All => return Err(Error::invalid(field(), "type a is for cgroup rules")),
    };
    let number = |name, value: i64| {
        u32::try_from(value)
            .map_err(|_| Error::invalid(field(), format!("{name} {value} is out of range")))
    };
    let device_number = match kind {
        FileType::Fifo => 0,
        _ => makedev(number("major", device.major)?, number("minor", device.minor)?),
    };
    Ok(Node {
        path: device.path.clone(),
        kind,
        device: device_number,
        mode: device.file_mode.unwrap_or(0o666) & 0o7777,
        uid: device.uid.unwrap_or(0),
        gid: device.gid.unwrap_or(0),
    })
}

/// Makes the default devices, the devices of `linux.devices`, and the links.
pub(crate) fn make_all(root: BorrowedFd<'_>, devices: &[Device]) -> Result<()> {
    for (path, major, minor) in DEFAULTS {
        // The specification's own entry for the same path follows, with its own mode and owner.
        if devices.iter().any(|device| device.path == Path::new(path)) {
            continue;
        }
        let device = makedev(major, minor);
        let (kind, path) = (FileType::CharacterDevice, path.into());
        make(root, &Node { path, kind, device, mode: 0o666, uid: 0, gid: 0 })?;
    }
    for device in devices {
        make(root, &node_of(device)?)?;
    }
    make_links(root)
}

fn make(root: BorrowedFd<'_>, node: &Node) -> Result<()> {
    let what = || format!("make the device {}", node.path.display());
    let (parent, name) = path::open_parent(root, &node.path).context(what)?;
    let mode = Mode::from_raw_mode(node.mode);
    match mknodat(&parent, &name, node.kind, mode, node.device) {
        Ok(()) => {}
        Err(Errno::EXIST) => {
            let stat = statat(&parent, &name, AtFlags::SYMLINK_NOFOLLOW).context(what)?;
            let same = FileType::from_raw_mode(stat.st_mode) == node.kind
                && (node.kind == FileType::Fifo || stat.st_rdev == node.device);
            if !same {
                let path = node.path.display();
                return Err(Error::internal(format!("{path} exists and is another kind of file")));
            }
        }
        // A user namespace has no right to mknod: bind the guest's own node.
        Err(Errno::PERM) => return bind(root, node),
        Err(e) => return Err(e).context(what),
    }
    let (uid, gid) = (Uid::from_raw(node.uid), Gid::from_raw(node.gid));
    chownat(&parent, &name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).context(what)?;
    // The final component is no symbolic link: the node was made or compared just above.
    chmodat(&parent, &name, mode, AtFlags::empty()).context(what)
}

fn bind(root: BorrowedFd<'_>, node: &Node) -> Result<()> {
    let what = || format!("bind the device {}", node.path.display());
    let own = statat(CWD, &node.path, AtFlags::SYMLINK_NOFOLLOW).context(what)?;
    if own.st_rdev != node.device || FileType::from_raw_mode(own.st_mode) != node.kind {
        let path = node.path.display();
        let why = "a user namespace cannot make it, and the guest's node is another device";
        return Err(Error::invalid(format!("linux.devices[{path}]"), why));
    }
    let tree = mounts::clone_tree(CWD, &node.path, false).context(what)?;
    let target = path::open_or_make(root, &node.path, Missing::File).context(what)?;
    mounts::attach(tree, target).context(what)
}

fn make_links(root: BorrowedFd<'_>) -> Result<()> {
    let dev = path::open_or_make(root, Path::new("/dev"), Missing::Directory);
    let dev = dev.context(|| "make /dev")?;
    for (name, target) in LINKS {
        match rustix::fs::symlinkat(target, &dev, name) {
            Ok(()) => {}
            // The image's node would open the guest's pseudo-terminals, not the container's.
            Err(Errno::EXIST) if name == "ptmx" => replace_ptmx(dev.as_fd(), target)?,
            Err(Errno::EXIST) => {}
            Err(e) => return Err(e).context(|| format!("link /dev/{name} to {target}")),
        }
    }
    Ok(())
}

fn replace_ptmx(dev: BorrowedFd<'_>, target: &str) -> Result<()> {
    rustix::fs::unlinkat(dev, "ptmx", AtFlags::empty())
        .and_then(|()| rustix::fs::symlinkat(target, dev, "ptmx"))
        .context(|| format!("link /dev/ptmx to {target}"))
}

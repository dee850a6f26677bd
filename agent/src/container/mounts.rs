//! One entry of `mounts`: created detached, given its attributes, then attached inside the root.
//!
//! The descriptor-based mount calls complete a mount before anybody can see it. Its target is a
//! descriptor resolved inside the root, not a path that could change.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
    move_mount, open_tree,
};

use super::copy_up;
use super::mount_options::{MountAttr, MountOptions};
use super::path::{self, Missing};
use crate::error::{Context as _, Error, Result};
use crate::oci::Mount;

/// File systems whose superblock is shared, or is not the mount's own. There read-only is an
/// attribute of the mount and never of the file system.
const PSEUDO: [&str; 8] =
    ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup2", "hugetlbfs", "ramfs"];

/// Properties of the container that its mounts depend on.
pub(crate) struct MountContext<'a> {
    /// The root of the container's file system, attached.
    pub(crate) root: BorrowedFd<'a>,
    /// The container's cgroup in the guest, unless a cgroup namespace shows it.
    pub(crate) cgroup: Option<&'a Path>,
}

/// Creates and attaches one mount. Returns the mount if it still has to become read-only: a tmpfs
/// waits until all its contents are there.
pub(crate) fn mount(context: &MountContext<'_>, mount: &Mount) -> Result<Option<OwnedFd>> {
    let destination = &mount.destination;
    let mut options = MountOptions::of(mount)
        .map_err(|why| Error::invalid(format!("mount on {}", destination.display()), why))?;
    let late_read_only = mount.kind.as_deref() == Some("tmpfs") && options.set.take_read_only();
    let at = || format!("mount on {}", destination.display());
    let (tree, target) = match (options.bind, mount.kind.as_deref(), context.cgroup) {
        (Some(recursive), _, _) => {
            let source = mount.source.as_deref().unwrap_or(Path::new(""));
            bind(context, source, destination, recursive)?
        }
        (None, Some("cgroup" | "cgroup2"), Some(own)) => bind(context, own, destination, false)?,
        (None, Some("cgroup" | "cgroup2"), None) => new(context, "cgroup2", mount, &options)?,
        (None, kind, _) => new(context, kind.unwrap_or_default(), mount, &options)?,
    };
    if !options.set.is_empty() {
        set_attributes(&tree, options.set, false).context(at)?;
    }
    if options.copy_up {
        copy_up::copy(&target, &tree).context(|| format!("{}: tmpcopyup", at()))?;
    }
    attach(&tree, &target).context(at)?;
    if !options.recursive.is_empty() {
        set_attributes(&tree, options.recursive, true).context(at)?;
    }
    for (flags, recursive) in &options.propagation {
        set_propagation(&tree, *flags, *recursive).context(at)?;
    }
    Ok(late_read_only.then_some(tree))
}

fn bind(
    context: &MountContext<'_>,
    source: &Path,
    destination: &Path,
    recursive: bool,
) -> Result<(OwnedFd, OwnedFd)> {
    let what = || format!("bind {} on {}", source.display(), destination.display());
    let tree = clone_tree(CWD, source, recursive).context(what)?;
    let make = if path::is_dir(&tree).context(what)? { Missing::Directory } else { Missing::File };
    let target = path::open_or_make(context.root, destination, make).context(what)?;
    Ok((tree, target))
}

fn new(
    context: &MountContext<'_>,
    kind: &str,
    mount: &Mount,
    options: &MountOptions,
) -> Result<(OwnedFd, OwnedFd)> {
    let destination = &mount.destination;
    let at = || format!("mount {kind} on {}", destination.display());
    let (target, data) = match path::open(context.root, destination, OFlags::PATH) {
        Ok(target) if kind == "tmpfs" => {
            let data = tmpfs_data(&target, options).context(at)?;
            (target, data)
        }
        _ => {
            let target = path::open_or_make(context.root, destination, Missing::Directory);
            (target.context(at)?, options.data.clone())
        }
    };
    if matches!(kind, "proc" | "sysfs") {
        refuse_link(context, destination)?;
    }
    let source = mount.source.as_deref().filter(|source| !source.as_os_str().is_empty());
    let tree = new_file_system(kind, source, &data, options.set).map_err(|why| {
        Error::internal(format!("mount {kind} on {}: {why}", destination.display()))
    })?;
    Ok((tree, target))
}

/// Options of a tmpfs over a directory of the image. It keeps the directory's mode, and with
/// `tmpcopyup` its owner, unless its own options set them.
fn tmpfs_data(target: &OwnedFd, options: &MountOptions) -> rustix::io::Result<Vec<String>> {
    let stat = rustix::fs::fstat(target)?;
    let mut data = options.data.clone();
    let mut take_over = |key: &str, value: String| {
        let given = |option: &String| option.split_once('=').is_some_and(|(name, _)| name == key);
        if !data.iter().any(given) {
            data.push(format!("{key}={value}"));
        }
    };
    take_over("mode", format!("{:04o}", stat.st_mode & 0o7777));
    if options.copy_up {
        take_over("uid", stat.st_uid.to_string());
        take_over("gid", stat.st_gid.to_string());
    }
    Ok(data)
}

/// Refuses a symbolic link as a mount point of proc or sysfs. The masked and read-only paths assume
/// /proc at /proc, so an image must not redirect it.
fn refuse_link(context: &MountContext<'_>, destination: &Path) -> Result<()> {
    let itself = path::open(context.root, destination, OFlags::PATH | OFlags::NOFOLLOW)
        .and_then(rustix::fs::fstat)
        .context(|| format!("mount on {}", destination.display()))?;
    if FileType::from_raw_mode(itself.st_mode) == FileType::Symlink {
        let path = destination.display();
        let why = "is a symbolic link in the image, and has to be a directory";
        return Err(Error::internal(format!("mount on {path}: {path} {why}")));
    }
    Ok(())
}

/// Creates a detached instance of a file system.
fn new_file_system(
    kind: &str,
    source: Option<&Path>,
    data: &[String],
    attr: MountAttr,
) -> std::result::Result<OwnedFd, String> {
    let fs = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|e| match e {
        Errno::NODEV => "this guest kernel has no such file system".to_owned(),
        e => e.to_string(),
    })?;
    let told = |what: &str, result: std::result::Result<(), Errno>| {
        result.map_err(|e| format!("{what}: {}", complaint(&fs, e)))
    };
    if let Some(source) = source {
        told("source", fsconfig_set_string(&fs, "source", source))?;
    }
    for option in data {
        told(
            option,
            match option.split_once('=') {
                Some((key, value)) => fsconfig_set_string(&fs, key, value),
                None => fsconfig_set_flag(&fs, option.as_str()),
            },
        )?;
    }
    if attr.read_only() && !PSEUDO.contains(&kind) {
        told("ro", fsconfig_set_flag(&fs, "ro"))?;
    }
    told("cannot be set up", fsconfig_create(&fs))?;
    fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
        .map_err(|e| complaint(&fs, e))
}

/// The error text, with the file system's own message if it has one.
fn complaint(fs: &OwnedFd, e: Errno) -> String {
    let mut message = [0; 256];
    let reason = crate::error::reason(&e.into());
    match rustix::io::read(fs, &mut message[..]) {
        Ok(n) if n > 2 => {
            // The first two characters are the severity and a space.
            let text = String::from_utf8_lossy(&message[2..n]);
            format!("{reason} ({})", text.trim_end())
        }
        _ => reason,
    }
}

/// Creates a detached, empty, read-only tmpfs, which can hide a directory.
pub(crate) fn empty_directory() -> std::result::Result<OwnedFd, String> {
    let tree = new_file_system("tmpfs", Some(Path::new("tmpfs")), &[], MountAttr::default())?;
    set_attributes(&tree, MountAttr::READ_ONLY, false).map_err(|e| e.to_string())?;
    Ok(tree)
}

/// Makes a detached copy of the mount at a path.
pub(crate) fn clone_tree(
    dir: BorrowedFd<'_>,
    path: &Path,
    recursive: bool,
) -> rustix::io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(dir, path, flags)
}

/// Attaches a mount to a place. The descriptor still refers to the mount afterwards.
pub(crate) fn attach(tree: impl AsFd, target: impl AsFd) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, "", target, "", flags)
}

/// Changes attributes of a mount, and of all mounts below it if `recursive`.
pub(crate) fn set_attributes(
    tree: impl AsFd,
    attr: MountAttr,
    recursive: bool,
) -> std::io::Result<()> {
    let attr = mount_attr(attr.set, attr.clear, 0);
    crate::syscall::mount_setattr(tree.as_fd(), recursive, &attr)
}

/// Changes the propagation of a mount, and of all mounts below it if `recursive`.
pub(crate) fn set_propagation(
    tree: impl AsFd,
    flags: MountPropagationFlags,
    recursive: bool,
) -> std::io::Result<()> {
    let attr = mount_attr(0, 0, u64::from(flags.bits()));
    crate::syscall::mount_setattr(tree.as_fd(), recursive, &attr)
}

fn mount_attr(set: u64, clear: u64, propagation: u64) -> libc::mount_attr {
    libc::mount_attr { attr_set: set, attr_clr: clear, propagation, userns_fd: 0 }
}

/// Refreshes the cached attributes of a bind mount's source from the host. Engines write
/// /etc/resolv.conf and /etc/hosts between create and start, and the guest caches a file's size for
/// a second.
pub(crate) fn revalidate(source: &Path) {
    let flags = AtFlags::STATX_FORCE_SYNC;
    // A missing source becomes an error for the process that opens it.
    let _ = rustix::fs::statx(CWD, source, flags, StatxFlags::BASIC_STATS);
}

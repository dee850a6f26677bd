//! The /proc of the mount view. It has the processes that stand for the container on the host,
//! because Podman's `top` looks for these there.
//!
//! Each process has a few files, but no link that leads anywhere. By a link such as `root`, a
//! symbolic link of the container could take Podman's `cp` to the host's files.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{CWD, Mode, OFlags, mkdirat, openat, symlinkat},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
        fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
    },
};

use crate::mount::change_attributes;

/// Files of each process (proc(5)).
const FILES: [&str; 3] = ["cmdline", "stat", "status"];

/// Mounts the /proc at `place`, a directory. Fails if a process has ended.
pub(crate) fn mount(place: impl AsFd, pids: &[i32]) -> io::Result<()> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    // The tmpfs has directories, links and empty files to mount on. The limits hold even if
    // something goes wrong.
    for (key, value) in [("mode", "0555"), ("size", "64k"), ("nr_inodes", "64")] {
        fsconfig_set_string(context.as_fd(), key, value)?;
    }
    fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC
        | MountAttrFlags::MOUNT_ATTR_NOSUID;
    let root = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    // Nothing can be mounted in the tmpfs before it is attached.
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(root.as_fd(), "", place, "", flags)?;
    show(&root, "stat")?;
    for pid in pids {
        let mode = Mode::from_raw_mode(0o555);
        mkdirat(&root, pid.to_string(), mode)?;
        mkdirat(&root, format!("{pid}/ns"), mode)?;
        symlinkat(fs::read_link(format!("/proc/{pid}/ns/pid"))?, &root, format!("{pid}/ns/pid"))?;
        for file in FILES {
            show(&root, &format!("{pid}/{file}"))?;
        }
    }
    change_attributes(root.as_fd(), libc::MOUNT_ATTR_RDONLY, 0, 0)
}

/// Mounts a file of the host's /proc below `root`.
fn show(root: &OwnedFd, file: &str) -> io::Result<()> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    openat(root, file, flags, Mode::from_raw_mode(0o444))?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, Path::new("/proc").join(file), flags)?;
    Ok(move_mount(tree.as_fd(), "", root, file, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

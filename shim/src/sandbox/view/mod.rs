//! What whoever enters the container's mount namespace finds there.
//!
//! Podman's `cp` and `top` enter the mount namespace of the container's pid and call its root the
//! container's. That pid is the sandbox process, whose namespace has the host's files. So the
//! container's root file system is mounted over the root of the namespace, with the container's bind
//! mounts in it, and a /proc. A process that enters starts from what lies on top; the sandbox process,
//! which has been there before, goes on to see the host.

mod processes;

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use oci_spec::runtime::Mount;
use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags, openat2},
    io::Errno,
    mount::{MoveMountFlags, move_mount},
};

use super::{launch::Launch, share};
use crate::{bundle::Bind, error::Explain, error::Result};

/// Covers the root of this process's mount namespace, which has to be its own, with the container's,
/// whose /proc shows the processes `pids` of the host. A VMM has to have left it by then, for it changes
/// its root in a copy of it.
///
/// # Errors
///
/// If a source is gone or cannot be bound.
pub(super) fn cover(launch: &Launch, pids: &[i32]) -> Result<()> {
    let read_only = launch.spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
    let root = share::clone(&launch.rootfs, true, read_only)?;
    // All before the root is covered: from then on this process counts as one that has changed its
    // root, and may make no user namespace for ids to be mapped by.
    let binds = launch.binds.iter().map(|bind| Ok((bind, share::clone_bind(bind)?)));
    let binds: Vec<(&Bind, OwnedFd)> = binds.collect::<Result<_>>()?;
    let what = || "cannot show the container's root in its mount namespace".into();
    move_mount(root.as_fd(), "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .explain(what)?;
    let mounts = launch.spec.mounts().as_deref().unwrap_or_default();
    for (bind, tree) in &binds {
        let Some(mount) = mounts.get(bind.mount) else { continue };
        let Some(place) = find(root.as_fd(), mount.destination(), OFlags::empty()).explain(what)?
        else {
            continue;
        };
        attach(bind, tree, &place)?;
    }
    let proc = mounts.iter().find(|mount| mount.typ().as_deref() == Some("proc"));
    if let Some(path) = proc.map(Mount::destination)
        && let Some(place) = find(root.as_fd(), path, OFlags::DIRECTORY).explain(what)?
    {
        processes::mount(&place, pids)
            .explain(|| format!("cannot show processes in the mount namespace's {path:?}"))?;
    }
    Ok(())
}

/// A place in the container's root, as its links lead there. None if there is no such: in a file
/// system of the guest's own, for one, or no directory if `kind` asks for one.
fn find(root: BorrowedFd<'_>, path: &Path, kind: OFlags) -> rustix::io::Result<Option<OwnedFd>> {
    let (flags, resolve) = (OFlags::PATH | OFlags::CLOEXEC | kind, ResolveFlags::IN_ROOT);
    match openat2(root, path, flags, Mode::empty(), resolve | ResolveFlags::NO_MAGICLINKS) {
        Ok(place) => Ok(Some(place)),
        // AGAIN: its parents are being moved.
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::ACCESS | Errno::AGAIN) => Ok(None),
        Err(error) => Err(error),
    }
}

fn attach(bind: &Bind, tree: &OwnedFd, place: &OwnedFd) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    match move_mount(tree.as_fd(), "", place, "", flags) {
        // The guest has put a file where a directory was, or the other way round.
        Err(Errno::NOTDIR | Errno::INVAL) => Ok(()),
        result => result.explain(|| format!("cannot show {}", bind.source.display())),
    }
}

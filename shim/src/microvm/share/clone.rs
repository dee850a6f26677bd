//! Detached mounts, with the attributes of the share's trees.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::CWD,
    mount::{OpenTreeFlags, open_tree},
};

use super::id_mapped;
use crate::{
    bundle::{Bind, Propagation},
    error::{Explain, Result},
    mount::{change_attributes, mount_setattr},
};

/// Extent of a detached mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Depth {
    /// Without the mounts below its source.
    Top,
    /// With all mounts below its source.
    Whole,
}

/// Makes a detached mount of `source`.
///
/// Device nodes cannot be opened through the mount, so a guest that makes a node gets no device of
/// the host. The guest's own devices work, since the guest's kernel opens these itself.
pub(crate) fn clone(
    source: &Path,
    depth: Depth,
    read_only: bool,
    propagation: Propagation,
) -> Result<OwnedFd> {
    let what = || cannot_share(source);
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if depth == Depth::Whole {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = open_tree(CWD, source, flags).explain(what)?;
    set_up(&tree, read_only, propagation).explain(what)?;
    Ok(tree)
}

/// Makes a detached mount of a bind mount's source, with its mapped ids.
pub(crate) fn clone_bind(bind: &Bind, depth: Depth) -> Result<OwnedFd> {
    let tree = clone(&bind.source, depth, bind.read_only, bind.propagation)?;
    if let Some(map) = &bind.id_map {
        id_mapped::apply(tree.as_fd(), map, &bind.source)?;
    }
    Ok(tree)
}

/// Like [`clone`], of an open directory or file, without the mounts in it.
pub(crate) fn clone_of(
    root: &OwnedFd,
    read_only: bool,
    propagation: Propagation,
) -> std::io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(root, "", flags)?;
    set_up(&tree, read_only, propagation)?;
    Ok(tree)
}

/// Gives a detached tree the attributes of the share's trees.
fn set_up(tree: &OwnedFd, read_only: bool, propagation: Propagation) -> std::io::Result<()> {
    let mut set = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID;
    if read_only {
        set |= libc::MOUNT_ATTR_RDONLY;
    }
    // Either way, changes to these mounts in the share never reach the mounts of the host. A umount
    // of the host below the source does not find a private mount, so that keeps nothing busy.
    let (all, top) = match propagation {
        Propagation::Private => (libc::MS_PRIVATE, None),
        Propagation::PrivateTop => (libc::MS_SLAVE, Some(libc::MS_PRIVATE)),
        Propagation::Slave => (libc::MS_SLAVE, None),
    };
    change_attributes(tree.as_fd(), set, 0, all)?;
    if let Some(propagation) = top {
        let attr = libc::mount_attr { attr_set: 0, attr_clr: 0, propagation, userns_fd: 0 };
        mount_setattr(tree.as_fd(), false, &attr)?;
    }
    Ok(())
}

/// The error text for a `source` that cannot be shared.
pub(super) fn cannot_share(source: &Path) -> String {
    format!("cannot share {} with the microVM", source.display())
}

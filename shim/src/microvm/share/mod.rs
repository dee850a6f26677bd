//! The share: all of the host that the guest, and the VMM, can see.
//!
//! ```text
//! <state dir>/shared          a small tmpfs, read-only once built; root of VMM and virtio-fs
//!   <container id>/rootfs               the bundle's root file system
//!   <container id>/hooks/<n>            program of the n-th createContainer hook
//!   <container id>/mounts/<n>           source of the n-th mount of config.json, if that is a bind
//!                                       mount of a directory
//!   <container id>/mounts/<n>/file      the same of a file, in a directory that is a mount
//!   <container id>/mounts/<n>.<k>       k-th mount of the host below that source
//!   <container id>/mounts/root.<k>      k-th mount of the host in the root file system
//! ```
//!
//! Each directory of the share that is a mount becomes a file system of its own in the guest.
//!
//! The share exists in the sandbox process's mount namespace only. So the host's mount table is
//! never touched, and everything is unmounted when the last process of the sandbox ends. The
//! namespace receives the host's later mounts and sends none back. The share itself is a shared
//! mount, so that later mounts below it appear in the VMM's namespace too.

mod clone;
mod covers;
mod id_mapped;
mod mount_table;
mod origin;
mod trees;

use std::{
    fs,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, Mode, OFlags},
    mount::{
        MountFlags, MountPropagationFlags, OpenTreeFlags, UnmountFlags, mount, mount_change,
        mount_remount, open_tree, unmount,
    },
    thread::{UnshareFlags, unshare_unsafe},
};

pub(crate) use self::{
    clone::{clone, clone_bind},
    covers::Covers,
    origin::{Origin, WORKER, cannot_enter},
    trees::Trees,
};
use crate::{
    bundle::{Bundle, Inner},
    container_id::ContainerId,
    error::{Error, Explain, Result},
    mount::change_attributes,
    state::{SHARED, StateDir},
};

/// Puts this process into a mount namespace of its own. The namespace receives mounts from the
/// host's and sends none.
pub(crate) fn enter_namespace() -> Result<()> {
    // SAFETY: a new mount namespace leaves descriptors and memory as they are. The file system
    // attributes are shared with no other thread, because none has been started.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.map_err(|e| match e {
        rustix::io::Errno::PERM => {
            Error::new("no permission to make a mount namespace: isopod has to run as root")
        }
        e => Error::because("cannot make a mount namespace", e),
    })?;
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .explain(|| "cannot stop mounts from reaching the host".into())
}

/// The share, until it is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    path: PathBuf,
    root: OwnedFd,
    inner: Vec<Inner>,
    covers: Covers,
}

impl Share {
    /// Builds the share of the sandbox. A failure leaves nothing mounted.
    pub(crate) fn build(id: &ContainerId, bundle: &Bundle, dir: &StateDir) -> Result<Self> {
        let path = dir.path().join(SHARED);
        let what = || format!("cannot make the shared directory {}", path.display());
        fs::DirBuilder::new().mode(0o755).create(&path).explain(what)?;
        // The tmpfs has only directories and empty files to mount on. The limits hold even if
        // something goes wrong.
        mount("isopod", &path, "tmpfs", flags(), c"mode=0755,size=256k,nr_inodes=4k")
            .explain(what)?;
        mount_change(&path, MountPropagationFlags::SHARED).explain(what)?;
        // From here on dropping `share` unmounts it.
        let root = open_path(&path, OFlags::DIRECTORY).explain(what)?;
        let mut share = Self { root, path, inner: Vec::new(), covers: Covers::default() };
        let mut trees = Trees::open(bundle)?;
        share.inner = trees.take_inner();
        let container = share.path.join(id.as_str());
        trees.make_places(&container)?;
        trees.attach(&container)?;
        share.covers = trees.covers()?;
        share.covers.refresh()?;
        // Nothing but mounts belongs in the share. Read-only, so the guest cannot fill the host's
        // memory through it.
        mount_remount(&share.path, flags() | MountFlags::BIND | MountFlags::RDONLY, c"")
            .explain(|| format!("cannot make {} read-only", share.path.display()))?;
        Ok(share)
    }

    /// Mounts of the host below the container's root file system and bind mounts.
    pub(crate) fn inner(&self) -> &[Inner] {
        &self.inner
    }

    /// Takes the covers of the host's mounts, to be kept up to date.
    pub(crate) fn take_covers(&mut self) -> Covers {
        std::mem::take(&mut self.covers)
    }

    /// The root directory of the share.
    pub(crate) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        // If this fails, the end of the process unmounts it.
        let _ = unmount(&self.path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        let _ = fs::remove_dir(&self.path);
    }
}

fn flags() -> MountFlags {
    MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC
}

/// Makes another mount of the share at `path`: writable, and without the mounts in it.
pub(crate) fn writable(path: &Path) -> std::io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, path, flags)?;
    change_attributes(tree.as_fd(), 0, libc::MOUNT_ATTR_RDONLY, libc::MS_PRIVATE)?;
    Ok(tree)
}

fn open_path(path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, flags | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

//! The shared directory: all of the host that the guest, and the VMM, can see.
//!
//! ```text
//! <state dir>/shared          a small tmpfs, read-only once built; root of the VMM and of virtio-fs
//!   <container id>/rootfs               the bundle's root file system
//!   <container id>/hooks/<n>            program of the n-th createContainer hook
//!   <container id>/mounts/<n>           source of the n-th mount of config.json, if that is a bind
//!                                       mount of a directory
//!   <container id>/mounts/<n>/file      the same of a file, in a directory that is a mount
//!   <container id>/mounts/<n>.<k>       k-th mount of the host below that source
//!   <container id>/mounts/root.<k>      k-th mount of the host in the root file system
//! ```
//!
//! Each directory of it that is a mount becomes a file system of its own in the guest.
//!
//! It exists in the sandbox process's mount namespace only, so the host's mount table is never
//! touched, and everything is unmounted when the last process of the sandbox ends. The namespace
//! receives the host's later mounts and sends none back. The share itself is a shared mount, so that
//! what is mounted below it later appears in the VMM's namespace too.

mod covers;
mod table;
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

pub(super) use self::covers::Covers;
pub(super) use self::trees::{Trees, clone, clone_bind};
use super::launch::Launch;
use crate::{
    bundle::Inner,
    error::{Error, Explain, Result},
    state::{SHARED, StateDir},
};

/// Puts this process into a mount namespace of its own, which receives mounts from the host's and
/// sends none.
///
/// # Errors
///
/// If that is not permitted.
pub(super) fn enter_namespace() -> Result<()> {
    // SAFETY: a new mount namespace leaves descriptors and memory as they are; the file system
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

/// The shared directory, until it is dropped.
#[derive(Debug)]
pub(super) struct Share {
    path: PathBuf,
    root: OwnedFd,
    inner: Vec<Inner>,
    covers: Covers,
}

impl Share {
    /// Builds the shared directory of the sandbox.
    ///
    /// # Errors
    ///
    /// If a source is gone or cannot be bound. Nothing is left mounted.
    pub(super) fn build(launch: &Launch, dir: &StateDir) -> Result<Self> {
        let path = dir.path().join(SHARED);
        let what = || format!("cannot make the shared directory {}", path.display());
        fs::DirBuilder::new().mode(0o755).create(&path).explain(what)?;
        // Only directories and empty files to mount on; the limits are for what goes wrong.
        mount("isopod", &path, "tmpfs", flags(), c"mode=0755,size=256k,nr_inodes=4k")
            .explain(what)?;
        mount_change(&path, MountPropagationFlags::SHARED).explain(what)?;
        // From here on, dropping it unmounts.
        let root = open_path(&path, OFlags::DIRECTORY).explain(what)?;
        let mut share = Self { root, path, inner: Vec::new(), covers: Covers::default() };
        let mut trees = Trees::open(launch)?;
        share.inner = trees.take_inner();
        let container = share.path.join(launch.id.as_str());
        trees.make_places(&container)?;
        trees.attach(&container)?;
        share.covers = trees.covers()?;
        share.covers.refresh()?;
        // Nothing but mounts belongs in it, so the guest cannot fill the host's memory through it.
        mount_remount(&share.path, flags() | MountFlags::BIND | MountFlags::RDONLY, c"")
            .explain(|| format!("cannot make {} read-only", share.path.display()))?;
        Ok(share)
    }

    /// The mounts below others of the container that made it.
    pub(super) fn inner(&self) -> &[Inner] {
        &self.inner
    }

    /// The covers of what the host mounts in it, to be kept.
    pub(super) fn take_covers(&mut self) -> Covers {
        std::mem::take(&mut self.covers)
    }

    /// The root of the shared directory.
    pub(super) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        // If it fails, the end of the process does the same.
        let _ = unmount(&self.path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        let _ = fs::remove_dir(&self.path);
    }
}

fn cannot_share(source: &Path) -> String {
    format!("cannot share {} with the microVM", source.display())
}

fn flags() -> MountFlags {
    MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC
}

/// Another mount of the shared directory at `path`, without what is mounted in it, and writable.
///
/// # Errors
///
/// If that is not permitted.
pub(super) fn writable(path: &Path) -> std::io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, path, flags)?;
    change_attributes(tree.as_fd(), 0, libc::MOUNT_ATTR_RDONLY, libc::MS_PRIVATE)?;
    Ok(tree)
}

/// Sets and clears attributes (`MOUNT_ATTR_*`) of a whole tree of mounts, and sets its propagation
/// (`MS_*`).
pub(super) fn change_attributes(
    tree: BorrowedFd<'_>,
    set: u64,
    clear: u64,
    propagation: libc::c_ulong,
) -> std::io::Result<()> {
    let attr = libc::mount_attr { attr_set: set, attr_clr: clear, propagation, userns_fd: 0 };
    mount_setattr(tree, true, &attr)
}

/// Changes the mount that `tree` names, and all below it if asked.
pub(super) fn mount_setattr(
    tree: BorrowedFd<'_>,
    recursive: bool,
    attr: &libc::mount_attr,
) -> std::io::Result<()> {
    use std::os::fd::AsRawFd;
    let recursive = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a NUL-terminated string, `attr` is a valid mount_attr that outlives the
    // call, and its size is given; the kernel only reads both (mount_setattr(2)).
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            std::ptr::from_ref(attr),
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

fn open_path(path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, flags | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

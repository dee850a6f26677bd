//! The shared directory: all of the host that the guest, and the VMM, can see.
//!
//! ```text
//! <state dir>/shared          a small tmpfs, read-only once built; root of the VMM and of virtio-fs
//!   <container id>/rootfs     the bundle's root file system
//!   <container id>/hooks/<n>  program of the n-th createContainer hook
//!   <container id>/mounts/<n> source of the n-th mount of config.json, if that is a bind mount
//! ```
//!
//! It exists in the sandbox process's mount namespace only, so the host's mount table is never
//! touched, and everything is unmounted when the last process of the sandbox ends. The namespace
//! receives the host's later mounts and sends none back. The share itself is a shared mount, so that
//! what is mounted below it later appears in the VMM's namespace too.

use std::{
    fs::{self, File},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::{DirBuilderExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, Mode, OFlags},
    mount::{
        MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount,
        mount_change, mount_remount, move_mount, open_tree, unmount,
    },
    thread::{UnshareFlags, unshare_unsafe},
};

use super::{id_map, launch::Launch};
use crate::{
    bundle::{Bind, Propagation, shared_hook, shared_name},
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
        let share = Self { root: open_path(&path, OFlags::DIRECTORY).explain(what)?, path };
        let trees = Trees::open(launch)?;
        let container = share.path.join(launch.id.as_str());
        trees.make_places(&container)?;
        trees.attach(&container)?;
        // Nothing but mounts belongs in it, so the guest cannot fill the host's memory through it.
        mount_remount(&share.path, flags() | MountFlags::BIND | MountFlags::RDONLY, c"")
            .explain(|| format!("cannot make {} read-only", share.path.display()))?;
        Ok(share)
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

/// What of the host a container shares with its guest: mounts that are complete, with their attributes,
/// before they are attached anywhere.
#[derive(Debug)]
pub(super) struct Trees(Vec<Tree>);

#[derive(Debug)]
struct Tree {
    mount: OwnedFd,
    directory: bool,
    source: PathBuf,
    /// Where it goes, relative to the container's folder.
    place: PathBuf,
}

impl Trees {
    /// Opens all that a container shares, as it is mounted for this process.
    ///
    /// # Errors
    ///
    /// If a source is gone or cannot be bound.
    pub(super) fn open(launch: &Launch) -> Result<Self> {
        // Writable even if the container's root is read-only: the agent makes missing mount points
        // in it, as runc does, before it makes its own mount of it read-only.
        let mut trees = vec![Tree {
            mount: clone(&launch.rootfs, true, false, Propagation::of_root(&launch.spec))?,
            directory: true,
            source: launch.rootfs.clone(),
            place: "rootfs".into(),
        }];
        for bind in &launch.binds {
            trees.push(Tree {
                mount: clone_bind(bind)?,
                directory: bind.directory,
                source: bind.source.clone(),
                place: shared_name(bind),
            });
        }
        for (index, program) in launch.hooks.iter().enumerate() {
            trees.push(Tree {
                mount: clone(program, false, true, Propagation::Private)?,
                directory: false,
                source: program.clone(),
                place: shared_hook(index),
            });
        }
        Ok(Self(trees))
    }

    /// Makes the container's folder and what the mounts are to be attached to.
    ///
    /// # Errors
    ///
    /// If one of these cannot be made.
    pub(super) fn make_places(&self, container: &Path) -> Result<()> {
        make_dir(container)?;
        for folder in ["mounts", "hooks"] {
            if self.0.iter().any(|tree| tree.place.starts_with(folder)) {
                make_dir(&container.join(folder))?;
            }
        }
        for tree in &self.0 {
            let place = container.join(&tree.place);
            if tree.directory { make_dir(&place)? } else { make_file(&place)? }
        }
        Ok(())
    }

    /// Attaches the mounts in the container's folder.
    ///
    /// # Errors
    ///
    /// If one cannot be attached. Those before it are.
    pub(super) fn attach(&self, container: &Path) -> Result<()> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        self.0.iter().try_for_each(|tree| {
            move_mount(tree.mount.as_fd(), "", CWD, container.join(&tree.place), flags)
                .explain(|| cannot_share(&tree.source))
        })
    }
}

fn cannot_share(source: &Path) -> String {
    format!("cannot share {} with the microVM", source.display())
}

fn flags() -> MountFlags {
    MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC
}

/// A mount of `source` that is attached nowhere.
///
/// Device nodes cannot be opened through it: a guest that makes one gets no device of the host. Its
/// own devices work, since its kernel opens those itself.
pub(super) fn clone(
    source: &Path,
    recursive: bool,
    read_only: bool,
    propagation: Propagation,
) -> Result<OwnedFd> {
    let what = || cannot_share(source);
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = open_tree(CWD, source, flags).explain(what)?;
    let mut set = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID;
    if read_only {
        set |= libc::MOUNT_ATTR_RDONLY;
    }
    // Either way what happens to these mounts in the share never reaches those of the host. A private
    // mount is none that the host finds when it unmounts below the source, so it keeps nothing busy.
    let (all, top) = match propagation {
        Propagation::Private => (libc::MS_PRIVATE, None),
        Propagation::PrivateTop => (libc::MS_SLAVE, Some(libc::MS_PRIVATE)),
        Propagation::Slave => (libc::MS_SLAVE, None),
    };
    change_attributes(tree.as_fd(), set, 0, all).explain(what)?;
    if let Some(propagation) = top {
        let attr = libc::mount_attr { attr_set: 0, attr_clr: 0, propagation, userns_fd: 0 };
        mount_setattr(tree.as_fd(), false, &attr).explain(what)?;
    }
    Ok(tree)
}

/// A mount of what a bind mount shows, attached nowhere, with the owners that it is to show.
pub(super) fn clone_bind(bind: &Bind) -> Result<OwnedFd> {
    let tree = clone(&bind.source, bind.recursive, bind.read_only, bind.propagation)?;
    if let Some(map) = &bind.id_map {
        id_map::apply(tree.as_fd(), map, &bind.source)?;
    }
    Ok(tree)
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

fn make_dir(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .mode(0o755)
        .create(path)
        .explain(|| format!("cannot make {}", path.display()))
}

fn make_file(path: &Path) -> Result<()> {
    File::options()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(path)
        .map(drop)
        .explain(|| format!("cannot make {}", path.display()))
}

fn open_path(path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, flags | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

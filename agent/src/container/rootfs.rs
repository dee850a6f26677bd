//! The container's file system, from `root`, `mounts`, `linux.devices` and the path lists.
//!
//! Runs in the container's first process, in its own mount namespace, while the guest's file
//! systems are still visible. A descriptor of the container's root gives access to everything below
//! it. The process's own root changes last.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, OFlags, StatxFlags, statx};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags, unmount};

use super::device_nodes;
use super::mount_options::{self, MountAttr};
use super::mounts::{self, MountContext};
use super::path::{self, Missing};
use super::spec::ContainerSpec;
use super::terminal::Terminal;
use crate::error::{Context as _, Error, Result};
use crate::oci::NamespaceKind;

/// Builds the file system and makes it the root of this process. Calls `before_pivot` in between.
/// Returns the terminal, if the process has one.
pub(crate) fn enter(
    spec: &ContainerSpec,
    cgroup: &Path,
    before_pivot: impl FnOnce() -> Result<()>,
) -> Result<Option<Terminal>> {
    let root = attach_root(spec.rootfs())?;
    let own_cgroup = !spec.namespaces.has(NamespaceKind::Cgroup);
    let context = MountContext { root: root.as_fd(), cgroup: own_cgroup.then_some(cgroup) };
    let mut read_only = Vec::new();
    for mount in &spec.spec.mounts {
        read_only.extend(mounts::mount(&context, mount)?);
    }
    if !is_bound(spec, Path::new("/dev")) {
        device_nodes::make_all(root.as_fd(), &spec.linux.devices)?;
    }
    let terminal = if spec.process.terminal {
        let terminal = Terminal::open(root.as_fd())?;
        terminal.bind_console(root.as_fd())?;
        Some(terminal)
    } else {
        None
    };
    // A missing working directory is created, as in other runtimes.
    make_cwd(root.as_fd(), &spec.process.cwd)?;
    for tree in read_only {
        mounts::set_attributes(tree, MountAttr::READ_ONLY, false)
            .context(|| "make a tmpfs read-only")?;
    }
    let mut covers = Covers::default();
    for path in &spec.linux.readonly_paths {
        make_read_only(root.as_fd(), path, &mut covers)?;
    }
    let mut covers = Covers::default();
    for path in &spec.linux.masked_paths {
        mask(root.as_fd(), path, &mut covers)?;
    }
    before_pivot()?;
    pivot(&root)?;
    finish_root(spec, &root)?;
    Ok(terminal)
}

/// Makes the guest's mounts private, so that no later mount shows in the guest. Then makes the
/// container's root a mount of its own, which pivot_root(2) demands.
fn attach_root(rootfs: &Path) -> Result<OwnedFd> {
    let guest = path::open_in_guest("/", OFlags::PATH).context(|| "open /")?;
    mounts::set_propagation(&guest, MountPropagationFlags::PRIVATE, true)
        .context(|| "make the mounts of the guest private")?;
    let what = || format!("use {} as the root", rootfs.display());
    let target = path::open_in_guest(rootfs, OFlags::PATH | OFlags::DIRECTORY).context(what)?;
    let root = mounts::clone_tree(target.as_fd(), Path::new(""), true).context(what)?;
    mounts::attach(&root, &target).context(what)?;
    Ok(root)
}

fn is_bound(spec: &ContainerSpec, destination: &Path) -> bool {
    spec.spec.mounts.iter().any(|mount| {
        let bind = mount.kind.as_deref() == Some("bind")
            || mount.options.iter().any(|o| o == "bind" || o == "rbind");
        bind && mount.destination == destination
    })
}

fn make_cwd(root: BorrowedFd<'_>, cwd: &Path) -> Result<()> {
    match path::open_or_make(root, cwd, Missing::Directory) {
        // The process itself finds out, as its user, whether it may enter the directory.
        Ok(_) | Err(Errno::ROFS | Errno::ACCESS) => Ok(()),
        Err(e) => Err(e).context(|| format!("make the working directory {}", cwd.display())),
    }
}

/// Ids of the mounts that one of the path lists has made. A path listed twice, by whatever names,
/// is covered once.
#[derive(Default)]
struct Covers(Vec<u64>);

impl Covers {
    /// Mounts `cover` on a path and records the mount.
    fn attach(&mut self, cover: &OwnedFd, target: &OwnedFd) -> rustix::io::Result<()> {
        mounts::attach(cover, target)?;
        self.0.push(mount_id(cover)?);
        Ok(())
    }

    fn have(&self, target: &OwnedFd) -> rustix::io::Result<bool> {
        Ok(self.0.contains(&mount_id(target)?))
    }
}

fn mount_id(fd: &OwnedFd) -> rustix::io::Result<u64> {
    Ok(statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?.stx_mnt_id)
}

/// Hides a path: a directory behind an empty one, any other file behind /dev/null.
fn mask(root: BorrowedFd<'_>, path: &Path, covers: &mut Covers) -> Result<()> {
    let what = || format!("mask {}", path.display());
    let Some(target) = existing(root, path).context(what)? else { return Ok(()) };
    if covers.have(&target).context(what)? {
        return Ok(());
    }
    let cover = if path::is_dir(&target).context(what)? {
        mounts::empty_directory().map_err(|why| Error::internal(format!("{}: {why}", what())))?
    } else {
        let null = mounts::clone_tree(CWD, Path::new("/dev/null"), false).context(what)?;
        // The node is the guest's, and a container must not change its mode and owner.
        mounts::set_attributes(&null, MountAttr::READ_ONLY, false).context(what)?;
        null
    };
    covers.attach(&cover, &target).context(what)
}

fn make_read_only(root: BorrowedFd<'_>, path: &Path, covers: &mut Covers) -> Result<()> {
    let what = || format!("make {} read-only", path.display());
    let Some(target) = existing(root, path).context(what)? else { return Ok(()) };
    if covers.have(&target).context(what)? {
        return Ok(());
    }
    let tree = mounts::clone_tree(target.as_fd(), Path::new(""), true).context(what)?;
    mounts::set_attributes(&tree, MountAttr::READ_ONLY, false).context(what)?;
    covers.attach(&tree, &target).context(what)
}

/// Opens a path of the lists, or returns `None` if the image or kernel does not have it.
fn existing(root: BorrowedFd<'_>, path: &Path) -> std::result::Result<Option<OwnedFd>, Errno> {
    match path::open(root, path, OFlags::PATH) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Swaps the roots and unmounts the guest's. Both roots have the same mount point, with the old one
/// on top, so its descriptor is enough to unmount it.
fn pivot(root: &OwnedFd) -> Result<()> {
    let what = || "make the container's root the root of its mount namespace";
    let old = path::open_in_guest("/", OFlags::PATH | OFlags::DIRECTORY).context(what)?;
    rustix::process::fchdir(root).context(what)?;
    rustix::process::pivot_root(".", ".").context(what)?;
    rustix::process::fchdir(&old).context(what)?;
    unmount(".", UnmountFlags::DETACH).context(|| "unmount the guest's root")?;
    rustix::process::chdir("/").context(|| "enter the container's root")
}

fn finish_root(spec: &ContainerSpec, root: &OwnedFd) -> Result<()> {
    let name = &spec.linux.rootfs_propagation;
    if !name.is_empty() {
        let (flags, recursive) = mount_options::rootfs_propagation(name)?;
        mounts::set_propagation(root, flags, recursive)
            .context(|| format!("apply linux.rootfsPropagation {name:?}"))?;
    }
    if spec.spec.root.as_ref().is_some_and(|root| root.readonly) {
        mounts::set_attributes(root, MountAttr::READ_ONLY, false)
            .context(|| "make the root read-only")?;
    }
    Ok(())
}

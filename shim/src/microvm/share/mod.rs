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
mod trees;

use std::{
    fs,
    io::ErrorKind,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
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
    clone::{Depth, clone, clone_bind},
    covers::Covers,
    id_mapped::apply as map_ids,
    trees::{Trees, TreesPlan},
};
use crate::{
    container_id::ContainerId,
    error::{Error, Explain, Result},
    event_loop::blocking,
    microvm::volumes::OpenVolume,
    mount::change_attributes,
    state::{SHARED, StateDir},
};

/// Puts the calling thread into a mount namespace of its own. The namespace receives mounts from the
/// host's and sends none.
pub(crate) fn enter_namespace() -> Result<()> {
    // SAFETY: a new mount namespace leaves descriptors and memory as they are. Root and working
    // directory become this thread's own (CLONE_NEWNS implies CLONE_FS): no other thread's change.
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
}

impl Share {
    /// Builds an empty share in the state directory of the sandbox. A failure leaves nothing
    /// mounted.
    pub(crate) fn build(dir: &StateDir) -> Result<Self> {
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
        let share = Self { root, path };
        // Nothing but mounts belongs in the share. Read-only, so the guest cannot fill the host's
        // memory through it.
        mount_remount(&share.path, flags() | MountFlags::BIND | MountFlags::RDONLY, c"")
            .explain(|| format!("cannot make {} read-only", share.path.display()))?;
        Ok(share)
    }

    /// Adds the trees of a container. A failure leaves nothing of them mounted.
    pub(crate) fn attach(self: &Arc<Self>, id: &ContainerId, trees: &Trees) -> Result<Attached> {
        let what = || format!("cannot add to the share {}", self.path.display());
        let view = writable(&self.path).explain(what)?;
        // From here on dropping `attached` removes everything that has been made.
        let mut attached = Attached {
            share: Arc::clone(self),
            id: id.clone(),
            covers: Covers::default(),
            volumes: trees.volumes(),
        };
        trees.make_places(&within(&view).join(id.as_str()))?;
        trees.attach(&self.path.join(id.as_str()))?;
        attached.covers = trees.covers()?;
        attached.covers.refresh()?;
        Ok(attached)
    }

    /// Unmounts the share, with everything in it. Once more does nothing.
    pub(crate) fn unmount(&self) {
        // If this fails, the end of the process unmounts it.
        let _ = unmount(&self.path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        let _ = fs::remove_dir(&self.path);
    }

    /// The root directory of the share.
    pub(crate) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.unmount();
    }
}

/// The trees of a container in the share, until this is dropped.
#[derive(Debug)]
pub(crate) struct Attached {
    share: Arc<Share>,
    /// Id of the container, and name of its folder in the share.
    id: ContainerId,
    covers: Covers,
    /// Volumes that are not in the share, because the guest has copies of them.
    volumes: Vec<OpenVolume>,
}

impl Attached {
    /// Takes the covers of the host's mounts, to be kept up to date.
    pub(crate) fn take_covers(&mut self) -> Covers {
        std::mem::take(&mut self.covers)
    }

    /// Takes the volumes that the guest is to have copies of.
    pub(crate) fn take_volumes(&mut self) -> Vec<OpenVolume> {
        std::mem::take(&mut self.volumes)
    }

    /// Removes the trees on another thread: the kernel waits for each mount.
    pub(crate) async fn detach(self) {
        let detached = blocking(move || {
            drop(self);
            Ok(())
        });
        if let Err(error) = detached.await {
            log::warn!("{error}");
        }
    }

    fn remove(&self) -> Result<()> {
        let container = self.share.path.join(self.id.as_str());
        let what = || format!("cannot remove {}", container.display());
        let view = match writable(&self.share.path) {
            // The share is gone, and the trees with it.
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            view => view.explain(what)?,
        };
        // Nothing is mounted in this view, so it has nothing but mount points.
        let places = within(&view).join(self.id.as_str());
        if !places.exists() {
            return Ok(());
        }
        for folder in ["hooks", "mounts"] {
            for entry in fs::read_dir(places.join(folder)).into_iter().flatten().flatten() {
                detach(&container.join(folder).join(entry.file_name()));
            }
        }
        detach(&container.join("rootfs"));
        // Fails while something is mounted there.
        fs::remove_dir_all(&places).explain(what)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            log::warn!("{error}");
        }
    }
}

/// Unmounts everything at `place`. Several mounts may lie on each other: mounts of the host on a
/// volume's source arrive here too.
fn detach(place: &Path) {
    while unmount(place, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok() {}
}

/// The path of an open directory.
fn within(directory: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/thread-self/fd/{}", directory.as_raw_fd()))
}

fn flags() -> MountFlags {
    MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC
}

/// Makes another mount of the share at `path`: writable, and without the mounts in it.
fn writable(path: &Path) -> std::io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, path, flags)?;
    change_attributes(tree.as_fd(), 0, libc::MOUNT_ATTR_RDONLY, libc::MS_PRIVATE)?;
    Ok(tree)
}

fn open_path(path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, flags | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

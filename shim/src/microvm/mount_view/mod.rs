//! The mount view: the mount namespace for processes that join the container.
//!
//! `podman cp` and `podman top` enter the mount namespace of the container's pid, and take its root
//! for the container's. The pid is that of the sandbox process, whose namespace has the host's
//! files. So the container's root file system is mounted over the root of the namespace, with the
//! container's bind mounts and a /proc in it.
//!
//! A process that enters starts from the topmost mount. The sandbox process has been there before,
//! so it goes on to see the host.
//!
//! `/proc/PID/root` is the root of that process's first thread. Others take it for the container's
//! root as well. So the first thread gets the same root and does nothing else.
//! Another thread does everything.

mod processes;

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::mpsc,
};

use oci_spec::runtime::Mount;
use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags, openat2},
    io::Errno,
    mount::{MoveMountFlags, move_mount},
    process::{chroot, fchdir},
    thread::{UnshareFlags, unshare_unsafe},
};
use tokio::sync::oneshot;

use crate::{
    bundle::{Bind, Bundle, Propagation},
    error::{Error, Explain, Result},
    microvm::share::{self, Depth},
};

/// Covers the root of this process's mount namespace with the container's root, and returns that
/// root. Its /proc shows the processes `pids` of the host.
///
/// The namespace has to be this process's own. A VMM has to have left it by then, because the VMM
/// changes its root in a copy of it.
pub(crate) fn cover(bundle: &Bundle, pids: &[i32]) -> Result<OwnedFd> {
    let read_only = bundle.spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
    let propagation = Propagation::of_root(&bundle.spec);
    let root = share::clone(&bundle.rootfs, Depth::Whole, read_only, propagation)?;
    // The bind mounts are opened before the root is covered. From then on this process counts as
    // one with a changed root, and may make no user namespace for mapped ids.
    let binds = bundle.binds.iter().filter(|bind| bind.shm.is_none());
    let binds = binds.map(|bind| {
        let depth = if bind.recursive { Depth::Whole } else { Depth::Top };
        Ok((bind, share::clone_bind(bind, depth)?))
    });
    let binds: Vec<(&Bind, OwnedFd)> = binds.collect::<Result<_>>()?;
    let what = || "cannot mount the container's root in its mount namespace".into();
    move_mount(root.as_fd(), "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .explain(what)?;
    let mounts = bundle.spec.mounts().as_deref().unwrap_or_default();
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
            .explain(|| format!("cannot mount processes at {path:?} in the mount namespace"))?;
    }
    Ok(root)
}

/// A root for the first thread, and the channel for the answer.
type Entry = (OwnedFd, oneshot::Sender<std::io::Result<()>>);

/// The worker's side. It has the first thread take a root.
#[derive(Debug)]
pub(crate) struct Cover(mpsc::Sender<Entry>);

/// The first thread's side.
#[derive(Debug)]
pub(crate) struct MainThread(mpsc::Receiver<Entry>);

/// Makes both sides.
pub(crate) fn main_thread() -> (Cover, MainThread) {
    let (sender, receiver) = mpsc::channel();
    (Cover(sender), MainThread(receiver))
}

impl Cover {
    /// Shows the root that [`cover`] has mounted to others, as the root of this process.
    pub(crate) async fn root(&self, root: OwnedFd) -> Result<()> {
        let what = || "cannot make the container's root the root of the sandbox process".to_owned();
        let (tell, told) = oneshot::channel();
        self.0.send((root, tell)).map_err(|_| Error::new(what()))?;
        told.await.map_err(|_| Error::new(what()))?.explain(what)
    }
}

impl MainThread {
    /// Does the worker's requests, until the worker has ended.
    pub(crate) fn serve(self) {
        while let Ok((root, tell)) = self.0.recv() {
            // A worker that does not wait any more is ending.
            let _ = tell.send(take_root(&root));
        }
    }
}

/// Makes `root` the root of the calling thread alone.
pub(crate) fn take_root(root: &OwnedFd) -> std::io::Result<()> {
    // SAFETY: root and working directory become this thread's own. The thread opens nothing by a
    // path.
    unsafe { unshare_unsafe(UnshareFlags::FS) }?;
    fchdir(root)?;
    Ok(chroot(".")?)
}

/// Finds a place in the container's root, by the links there. `None` if the place does not exist,
/// for example in a file system of the guest's own. `None` too if `kind` asks for a directory and
/// the place is none.
fn find(root: BorrowedFd<'_>, path: &Path, kind: OFlags) -> rustix::io::Result<Option<OwnedFd>> {
    let (flags, resolve) = (OFlags::PATH | OFlags::CLOEXEC | kind, ResolveFlags::IN_ROOT);
    match openat2(root, path, flags, Mode::empty(), resolve | ResolveFlags::NO_MAGICLINKS) {
        Ok(place) => Ok(Some(place)),
        // EAGAIN: a parent is being moved (openat2(2)).
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::ACCESS | Errno::AGAIN) => Ok(None),
        Err(error) => Err(error),
    }
}

fn attach(bind: &Bind, tree: &OwnedFd, place: &OwnedFd) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    match move_mount(tree.as_fd(), "", place, "", flags) {
        // The guest has put a file in the place of a directory, or the other way round.
        Err(Errno::NOTDIR | Errno::INVAL) => Ok(()),
        result => result.explain(|| format!("cannot bind-mount {}", bind.source.display())),
    }
}

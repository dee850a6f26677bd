//! What whoever enters the container's mount namespace finds there.
//!
//! Podman's `cp` and `top` enter the mount namespace of the container's pid and call its root the
//! container's. That pid is the sandbox process, whose namespace has the host's files. So the
//! container's root file system is mounted over the root of the namespace, with the container's bind
//! mounts in it, and a /proc. A process that enters starts from what lies on top; the sandbox process,
//! which has been there before, goes on to see the host.

//!
//! `/proc/PID/root` is the root of that process's first thread, and others take that for the container's
//! as well. So the first thread gets the same root, and does nothing; [`WORKER`] does everything.

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

use super::{launch::Launch, share};
use crate::{
    bundle::{Bind, Propagation},
    error::{Error, Explain, Result},
};

/// Covers the root of this process's mount namespace, which has to be its own, with the container's,
/// whose /proc shows the processes `pids` of the host, and returns that root. A VMM has to have left the
/// namespace by then, for it changes its root in a copy of it.
///
/// # Errors
///
/// If a source is gone or cannot be bound.
pub(super) fn cover(launch: &Launch, pids: &[i32]) -> Result<OwnedFd> {
    let read_only = launch.spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
    let propagation = Propagation::of_root(&launch.spec);
    let root = share::clone(&launch.rootfs, true, read_only, propagation)?;
    // All before the root is covered: from then on this process counts as one that has changed its
    // root, and may make no user namespace for ids to be mapped by.
    let binds = launch.binds.iter().filter(|bind| bind.shm.is_none());
    let binds = binds.map(|bind| Ok((bind, share::clone_bind(bind, bind.recursive)?)));
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
    Ok(root)
}

/// Name of the thread that goes on to see the host.
pub(super) const WORKER: &str = "isopod-worker";

/// A root for the first thread, and where to say that it has it.
type Entry = (OwnedFd, oneshot::Sender<std::io::Result<()>>);

/// The side of the worker: has the first thread take a root.
#[derive(Debug)]
pub(super) struct Cover(mpsc::Sender<Entry>);

/// The side of the first thread.
#[derive(Debug)]
pub(super) struct MainThread(mpsc::Receiver<Entry>);

/// Both sides.
pub(super) fn main_thread() -> (Cover, MainThread) {
    let (sender, receiver) = mpsc::channel();
    (Cover(sender), MainThread(receiver))
}

impl Cover {
    /// Makes the root that [`cover`] has mounted that of this process to others.
    ///
    /// # Errors
    ///
    /// If the kernel refuses it.
    pub(super) async fn root(&self, root: OwnedFd) -> Result<()> {
        let what = || "cannot make the container's root that of the sandbox process".to_owned();
        let (tell, told) = oneshot::channel();
        self.0.send((root, tell)).map_err(|_| Error::new(what()))?;
        told.await.map_err(|_| Error::new(what()))?.explain(what)
    }
}

impl MainThread {
    /// Does what the worker asks for, until that has ended.
    pub(super) fn serve(self) {
        while let Ok((root, tell)) = self.0.recv() {
            // Who does not wait any more is ending.
            let _ = tell.send(take_root(&root));
        }
    }
}

/// Makes `root` the root of the calling thread alone.
fn take_root(root: &OwnedFd) -> std::io::Result<()> {
    // SAFETY: root and working directory become this thread's own; it opens nothing by a path.
    unsafe { unshare_unsafe(UnshareFlags::FS) }?;
    fchdir(root)?;
    Ok(chroot(".")?)
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

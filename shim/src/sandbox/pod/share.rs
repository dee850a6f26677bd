//! What a container of a pod adds to the share of its microVM, and takes out again.
//!
//! The share is in the mount namespace of the sandbox process that has made it. A thread goes there,
//! with mounts that were opened where this process is: that namespace need not have them.

use std::{
    fs::{self, File},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Mode, OFlags, open},
    mount::{UnmountFlags, unmount},
    process::{chroot, fchdir},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};

use super::Pod;
use crate::{
    bundle::Inner,
    error::{Error, Explain, Result},
    sandbox::{
        forgetting::Forgetting,
        launch::Launch,
        share::{Covers, Trees, writable},
        view::WORKER,
    },
    state::{Id, ProcessId, SHARED},
};

/// A container's part of the share. Removed when dropped.
#[derive(Debug)]
pub(in crate::sandbox) struct PodShare {
    process: ProcessId,
    /// Where the share is in that process's mount namespace.
    path: PathBuf,
    /// The container's folder in it.
    id: Id,
    /// The mounts below others of the container.
    inner: Vec<Inner>,
    covers: Covers,
}

impl PodShare {
    /// That of the container `id`, whether anything is there or not.
    pub(super) fn of(pod: &Pod, id: &Id) -> Self {
        let (process, path) = (pod.process, pod.dir.join(SHARED));
        Self { process, path, id: id.clone(), inner: Vec::new(), covers: Covers::default() }
    }

    /// Adds what a container shares to the share of its pod.
    ///
    /// # Errors
    ///
    /// If a source is gone or cannot be bound, or the sandbox process of the pod is gone. Nothing is
    /// left mounted.
    pub(in crate::sandbox) fn attach(pod: &Pod, launch: &Launch) -> Result<Self> {
        let mut trees = Trees::open(launch)?;
        // From here on, dropping it removes what has been made.
        let mut share = Self::of(pod, &launch.id);
        share.inner = trees.take_inner();
        let Some(origin) = Origin::of(pod.process)? else {
            return Err(Error::new(format!("{}: it has ended", cannot_enter(pod.process.pid))));
        };
        share.covers = origin.within(|| {
            let what = || format!("cannot add to the share {}", share.path.display());
            let view = writable(&share.path).explain(what)?;
            trees.make_places(&within(&view).join(share.id.as_str()))?;
            trees.attach(&share.path.join(share.id.as_str()))?;
            let mut covers = trees.covers()?;
            covers.refresh()?;
            Ok(covers)
        })?;
        Ok(share)
    }

    /// Keeps the covers of what the host mounts in it, for as long as it is there.
    pub(in crate::sandbox) fn keep_covers(&mut self, forgetting: Forgetting) {
        tokio::spawn(std::mem::take(&mut self.covers).keep(Some(self.process), forgetting));
    }

    /// The mounts below others of the container that it was made for.
    pub(in crate::sandbox) fn inner(&self) -> &[Inner] {
        &self.inner
    }

    /// Removes all that there is. With the process that has the share, all of it is gone.
    ///
    /// # Errors
    ///
    /// If a mount or a folder cannot be removed.
    pub(super) fn remove(&self) -> Result<()> {
        let Some(origin) = Origin::of(self.process)? else { return Ok(()) };
        origin.within(|| {
            let container = self.path.join(self.id.as_str());
            let what = || format!("cannot remove {}", container.display());
            let view = match writable(&self.path) {
                // Removed by the sandbox process that has made it.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
                view => view.explain(what)?,
            };
            // In this view nothing is mounted, so what is found are places for mounts and no more.
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
        })
    }
}

impl Drop for PodShare {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            log::warn!("{error}");
        }
    }
}

/// Unmounts what is mounted at `path`, one on the other: what the host mounts on a volume's source comes
/// here too.
fn detach(path: &Path) {
    while unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok() {}
}

fn within(view: &impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", view.as_fd().as_raw_fd()))
}

/// Where another process is.
pub(in crate::sandbox) struct Origin {
    namespace: File,
    root: OwnedFd,
    pid: i32,
}

impl Origin {
    /// None if the process has ended, or is about to and has left already.
    pub(in crate::sandbox) fn of(process: ProcessId) -> Result<Option<Self>> {
        let pid = process.pid;
        let find = || -> std::io::Result<Self> {
            let namespace = File::open(format!("/proc/{pid}/ns/mnt"))?;
            // What others find as the root there is a container's, as is that of its first thread.
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let root = open(worker(pid)?.join("root"), flags, Mode::empty())?;
            Ok(Self { namespace, root, pid })
        };
        match find() {
            // If it is alive, the pid was still its own.
            Ok(origin) => Ok(process.is_alive().then_some(origin)),
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => Ok(None),
            Err(e) => Err(Error::because(cannot_enter(pid), e)),
        }
    }

    /// Does something there, as the process sees it, on a thread that goes there and ends.
    pub(in crate::sandbox) fn within<T: Send>(
        &self,
        work: impl FnOnce() -> Result<T> + Send,
    ) -> Result<T> {
        let what = || cannot_enter(self.pid);
        let go = || {
            // SAFETY: root and working directory become this thread's own, and no other code of it
            // runs.
            unsafe { unshare_unsafe(UnshareFlags::FS) }.explain(what)?;
            move_into_link_name_space(self.namespace.as_fd(), Some(LinkNameSpaceType::Mount))
                .explain(what)?;
            fchdir(&self.root).and_then(|()| chroot(".")).explain(what)?;
            work()
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().spawn_scoped(scope, go).explain(what)?;
            thread.join().unwrap_or_else(|_| Err(Error::new(what())))
        })
    }
}

/// Where /proc tells of the thread of a sandbox process that sees the host.
fn worker(pid: i32) -> std::io::Result<PathBuf> {
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = thread?.path();
        // One that has ended meanwhile is another one.
        if fs::read_to_string(thread.join("comm")).is_ok_and(|name| name.trim_end() == WORKER) {
            return Ok(thread);
        }
    }
    Err(std::io::Error::from_raw_os_error(libc::ESRCH))
}

fn cannot_enter(pid: i32) -> String {
    format!("cannot enter the mount namespace of process {pid}")
}

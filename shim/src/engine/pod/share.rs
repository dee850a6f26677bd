//! Trees that a member of a pod adds to the share of its microVM, and removes again.
//!
//! The share is in the mount namespace of the sandbox process that has made it. The trees are
//! opened where this process is, since the other namespace need not have their sources. A thread
//! then enters the other namespace with them.

use std::{
    fs,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
};

use rustix::mount::{UnmountFlags, unmount};

use crate::{
    bundle::{Bundle, Inner},
    container_id::ContainerId,
    error::{Error, Explain, Result},
    microvm::{
        drop_caches::DropCaches,
        share::{Covers, Origin, Trees, cannot_enter, writable},
    },
    process_id::ProcessId,
    state::SHARED,
};

/// A member's part of the share. Dropping it removes the part.
#[derive(Debug)]
pub(crate) struct PodShare {
    process: ProcessId,
    /// Path of the share in the mount namespace of that process.
    path: PathBuf,
    /// Id of the member, and name of its folder in the share.
    id: ContainerId,
    /// Mounts of the host below the member's root file system and bind mounts.
    inner: Vec<Inner>,
    covers: Covers,
}

impl PodShare {
    /// The part of the container `id` in the share of the sandbox process `process`. `dir` is the
    /// state directory of that process. The part may be empty.
    pub(crate) fn of(process: ProcessId, dir: &Path, id: &ContainerId) -> Self {
        let path = dir.join(SHARED);
        Self { process, path, id: id.clone(), inner: Vec::new(), covers: Covers::default() }
    }

    /// Adds the trees of a member to the share of its pod. Fails if a source is gone or cannot be
    /// bound, or the pod's sandbox process is gone. A failure leaves nothing mounted.
    pub(crate) fn attach(
        process: ProcessId,
        dir: &Path,
        id: &ContainerId,
        bundle: &Bundle,
    ) -> Result<Self> {
        let mut trees = Trees::open(bundle)?;
        // From here on dropping `share` removes everything that has been made.
        let mut share = Self::of(process, dir, id);
        share.inner = trees.take_inner();
        let Some(origin) = Origin::of(process)? else {
            return Err(Error::new(format!("{}: it has ended", cannot_enter(process.pid))));
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

    /// Starts to cover the mounts of the host that arrive in the trees, for as long as the share
    /// exists.
    pub(crate) fn keep_covers(&mut self, drop_caches: DropCaches) {
        tokio::spawn(std::mem::take(&mut self.covers).keep(Some(self.process), drop_caches));
    }

    /// Mounts of the host below the member's root file system and bind mounts.
    pub(crate) fn inner(&self) -> &[Inner] {
        &self.inner
    }

    /// Removes the member's part of the share. If the process with the share is gone, so is the
    /// part.
    pub(crate) fn remove(&self) -> Result<()> {
        let Some(origin) = Origin::of(self.process)? else { return Ok(()) };
        origin.within(|| {
            let container = self.path.join(self.id.as_str());
            let what = || format!("cannot remove {}", container.display());
            let view = match writable(&self.path) {
                // The sandbox process that has made the share has removed it.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
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

/// Unmounts everything at `path`. Several mounts may lie on each other: mounts of the host on a
/// volume's source arrive here too.
fn detach(path: &Path) {
    while unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok() {}
}

fn within(view: &impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", view.as_fd().as_raw_fd()))
}

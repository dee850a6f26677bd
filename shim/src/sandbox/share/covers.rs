//! Mounts of the host that arrive in the share, without the host having to wait for the guest when it
//! unmounts them.
//!
//! ```text
//!  host          share (a slave of the host's)       what the guest sees
//!  volume/new    mounts/<n>/new                      ── covered by ──►  a second mount of the same
//! ```
//!
//! The host's umount fails (EBUSY) while anybody has a file open in a copy of the mount that propagation
//! has made. The VMM has, for each file that the guest knows of. So each such copy is covered at once by
//! a mount of its own of the same file system, in which the VMM finds the files. No umount of the host
//! looks at that, and when the copy below has gone, the cover is taken away too.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
};

use rustix::mount::{MoveMountFlags, UnmountFlags, move_mount, unmount};
use tokio::{
    io::{Interest, unix::AsyncFd},
    task::spawn_blocking,
};

use super::{
    table::{MountTable, mount_of},
    trees::clone_of,
};
use crate::{
    bundle::Propagation,
    error::Result,
    sandbox::{forgetting::Forgetting, pod::Origin},
    state::ProcessId,
};

/// A tree of the share that follows the host.
#[derive(Debug, Clone, Copy)]
pub(super) struct Follower {
    /// The id of its mount.
    pub(super) mount: u64,
    pub(super) read_only: bool,
}

/// The covers of a container's trees.
#[derive(Debug, Default)]
pub(in crate::sandbox) struct Covers {
    followers: Vec<Follower>,
    /// By the ids of their mounts.
    made: HashMap<u64, Cover>,
    /// Some have been taken away.
    removed: bool,
}

#[derive(Debug)]
struct Cover {
    tree: OwnedFd,
    /// The id of the mount that it covers.
    covered: u64,
}

impl Covers {
    pub(super) fn new(followers: Vec<Follower>) -> Self {
        Self { followers, ..Self::default() }
    }

    /// Covers what has arrived, and takes away the covers of what has gone, in this thread's mount
    /// namespace.
    ///
    /// # Errors
    ///
    /// If there is no mount table.
    pub(in crate::sandbox) fn refresh(&mut self) -> Result<()> {
        // A cover receives what its file system's mount on the host does, so that may follow.
        while self.refresh_once(&MountTable::read()?) {}
        Ok(())
    }

    /// One pass. True if it has changed anything.
    fn refresh_once(&mut self, table: &MountTable) -> bool {
        let mut changed = false;
        self.made.retain(|id, cover| {
            let Some(mount) = table.get(*id) else { return false };
            if mount.parent == cover.covered {
                return true;
            }
            // By its descriptor: another mount may be there by now, above or below.
            let path = format!("/proc/thread-self/fd/{}", cover.tree.as_raw_fd());
            if let Err(e) = unmount(path, UnmountFlags::DETACH) {
                log::warn!("cannot unmount {}: {e}", mount.point.display());
            }
            (changed, self.removed) = (true, true);
            false
        });
        for follower in &self.followers {
            for mount in table.inside(follower.mount) {
                let covered = |cover: &Cover| cover.covered == mount.id;
                if self.made.contains_key(&mount.id) || self.made.values().any(covered) {
                    continue;
                }
                match cover(mount, follower.read_only) {
                    Ok(Some((id, tree))) => {
                        self.made.insert(id, Cover { tree, covered: mount.id });
                        changed = true;
                    }
                    // Nobody sees it.
                    Ok(None) => {}
                    Err(e) => log::debug!("cannot cover {}: {e}", mount.point.display()),
                }
            }
        }
        changed
    }

    /// Goes on with that for as long as the container is there, in the mount namespace of `process` if
    /// the share is another sandbox process's. The guest is to forget what has gone.
    pub(in crate::sandbox) async fn keep(
        mut self,
        process: Option<ProcessId>,
        forgetting: Forgetting,
    ) {
        if self.followers.is_empty() {
            return;
        }
        let table = match watch(process) {
            Ok(table) => table,
            Err(e) => return log::warn!("cannot watch the mount table: {e}"),
        };
        loop {
            // Where a file system does not answer, this waits on a thread of its own.
            let pass = spawn_blocking(move || {
                let result = match process {
                    None => self.refresh(),
                    Some(process) => match Origin::of(process) {
                        Ok(Some(origin)) => origin.within(|| self.refresh()),
                        Ok(None) => Ok(()),
                        Err(error) => Err(error),
                    },
                };
                (self, result)
            });
            let Ok((again, result)) = pass.await else { return };
            self = again;
            if std::mem::take(&mut self.removed) {
                forgetting.wish();
            }
            if let Err(error) = result {
                log::warn!("{error}");
            }
            match table.ready(Interest::PRIORITY).await {
                Ok(mut changed) => changed.clear_ready(),
                Err(_) => return,
            }
        }
    }
}

/// The mount table of a process, readable with priority when it changes.
fn watch(process: Option<ProcessId>) -> io::Result<AsyncFd<File>> {
    let of = process.map_or_else(|| "self".to_owned(), |process| process.pid.to_string());
    let path = PathBuf::from("/proc").join(of).join("mountinfo");
    // SAFETY: the file is owned by what is returned and is never given out but by reference, so its
    // descriptor stays open, and the same file, as long as it is registered.
    unsafe { AsyncFd::register_with_interest(File::open(path)?, Interest::PRIORITY) }
        .map_err(Into::into)
}

/// Covers a mount. Returns the id and the descriptor of its cover, or none if another mount hides it.
fn cover(mount: &super::table::Mount, read_only: bool) -> io::Result<Option<(u64, OwnedFd)>> {
    let Some(root) = mount.open()? else { return Ok(None) };
    // A slave of what it covers, for what the host mounts in it.
    let tree = clone_of(&root, read_only, Propagation::Slave)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(&tree, "", &root, "", flags)?;
    Ok(Some((mount_of(&tree)?, tree)))
}

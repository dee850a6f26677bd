//! Covers of the host's mounts that arrive in the share. The host can then unmount these without
//! waiting for the guest.
//!
//! ```text
//!  host          share (a slave of the host's)       what the guest sees
//!  volume/new    mounts/<n>/new                      ── covered by ──►  a second mount of the same
//! ```
//!
//! A umount of the host fails (EBUSY) while a file is open in a copy of the mount that propagation
//! has made. The VMM has a file open for each file that the guest knows of. So each copy is covered
//! at once by another mount of the same file system. The VMM finds the files in the cover.
//!
//! No umount of the host looks at the cover. When the copy below it has gone, the cover is removed
//! too.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use rustix::mount::{MoveMountFlags, UnmountFlags, move_mount, unmount};
use tokio::{
    io::{Interest, unix::AsyncFd},
    task::spawn_blocking,
};

use crate::{
    bundle::Propagation,
    error::Result,
    microvm::{
        drop_caches::DropCaches,
        share::{
            clone::clone_of,
            mount_table::{Mount, MountTable, mount_of},
        },
    },
};

/// A tree of the share that follows the host.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Follower {
    /// Id of the tree's mount.
    pub(crate) mount: u64,
    pub(crate) read_only: bool,
}

/// The covers of a container's trees.
#[derive(Debug, Default)]
pub(crate) struct Covers {
    followers: Vec<Follower>,
    /// Covers by the ids of their mounts.
    made: HashMap<u64, Cover>,
    /// True if covers have been removed.
    removed: bool,
}

#[derive(Debug)]
struct Cover {
    tree: OwnedFd,
    /// Id of the covered mount.
    covered: u64,
}

impl Covers {
    pub(crate) fn new(followers: Vec<Follower>) -> Self {
        Self { followers, ..Self::default() }
    }

    /// Covers mounts that have arrived, and removes the covers of mounts that have gone, in this
    /// thread's mount namespace.
    pub(crate) fn refresh(&mut self) -> Result<()> {
        // A cover receives the same mounts as its file system's mount on the host, so another pass
        // may find more.
        while self.refresh_once(&MountTable::read()?) {}
        Ok(())
    }

    /// Makes one pass. Returns true if it has changed anything.
    fn refresh_once(&mut self, table: &MountTable) -> bool {
        let mut changed = false;
        self.made.retain(|id, cover| {
            let Some(mount) = table.get(*id) else { return false };
            if mount.parent == cover.covered {
                return true;
            }
            // Unmounted by its descriptor: another mount may be at the path by now, above or below.
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
                    // Another mount hides it, so nobody sees it.
                    Ok(None) => {}
                    Err(e) => log::debug!("cannot cover {}: {e}", mount.point.display()),
                }
            }
        }
        changed
    }

    /// Keeps the covers up to date for as long as the container exists. The guest is asked to forget
    /// files of mounts that have gone.
    pub(crate) async fn keep(mut self, drop_caches: DropCaches) {
        if self.followers.is_empty() {
            return;
        }
        let table = match watch() {
            Ok(table) => table,
            Err(e) => return log::warn!("cannot watch the mount table: {e}"),
        };
        loop {
            // A file system that does not answer blocks this pass, so the pass has a thread of its
            // own.
            let pass = spawn_blocking(move || {
                let result = self.refresh();
                (self, result)
            });
            let Ok((again, result)) = pass.await else { return };
            self = again;
            if std::mem::take(&mut self.removed) {
                drop_caches.wish();
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

/// Opens this thread's mount table. The file is readable with priority when the table changes.
fn watch() -> io::Result<AsyncFd<File>> {
    let file = File::open("/proc/thread-self/mountinfo")?;
    // SAFETY: the returned value owns the file and gives it out only by reference. So the
    // descriptor stays open, and refers to the same file, as long as it is registered.
    unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }.map_err(Into::into)
}

/// Covers a mount. Returns the id and the descriptor of the cover, or `None` if another mount hides
/// the mount.
fn cover(mount: &Mount, read_only: bool) -> io::Result<Option<(u64, OwnedFd)>> {
    let Some(root) = mount.open()? else { return Ok(None) };
    // A slave of the covered mount, so that it receives the host's mounts in it.
    let tree = clone_of(&root, read_only, Propagation::Slave)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(&tree, "", &root, "", flags)?;
    Ok(Some((mount_of(&tree)?, tree)))
}

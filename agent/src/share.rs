//! The shared directory, and the kernel's caches of it.
//!
//! For each file of the share in these caches, the VMM keeps a descriptor, and the host's file
//! system stays busy.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use isopod_protocol::SHARED_DIR;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::container::path;
use crate::error::{Context as _, Result};

/// Least time between two drops of the caches on request. Each drop also loses entries that the
/// kernel soon needs again. The deletion of a container drops them at once.
const DROP_INTERVAL: Duration = Duration::from_secs(1);

/// Most mounts of a container that are examined, since a container may make any number.
const MAX_MOUNTS: usize = 1000;

/// Mounts the shared directory, the virtio-fs device with this tag.
pub(crate) fn attach(tag: &str) -> Result<()> {
    fs::create_dir_all(SHARED_DIR).context(|| format!("create {SHARED_DIR}"))?;
    mount(tag, SHARED_DIR, "virtiofs", MountFlags::empty(), None)
        .context(|| format!("mount the shared directory {tag:?} on {SHARED_DIR}"))
}

/// Unmounts the shared directory, if the sandbox has been set up.
pub(crate) fn detach() -> Result<()> {
    match unmount(SHARED_DIR, UnmountFlags::DETACH) {
        Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        result => result.context(|| format!("unmount {SHARED_DIR}")),
    }
}

/// Releases a container's folder. The kernel mounts a directory by itself at the first lookup, if
/// the directory is a mount on the host. These mounts go, and then the caches are dropped.
pub(crate) fn release(container_id: &str) -> Result<()> {
    let folder = Path::new(SHARED_DIR).join(container_id);
    let path = "/proc/self/mountinfo";
    let table = fs::read_to_string(path).context(|| format!("read {path}"))?;
    let points: Vec<PathBuf> = mount_points(&table, &folder).collect();
    // In reverse order, so that a mount on another mount goes first.
    for point in points.iter().rev() {
        match unmount(point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            // The mount has gone together with its parent.
            Err(Errno::INVAL | Errno::NOENT) => {}
            result => result.context(|| format!("unmount {}", point.display()))?,
        }
    }
    drop_caches()
}

/// The mount points below a folder whose path needs no escapes.
fn mount_points<'a>(table: &'a str, folder: &'a Path) -> impl Iterator<Item = PathBuf> + 'a {
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    points.filter(move |point| point.starts_with(folder))
}

/// Revalidates the mounts that the kernel has made by itself in the mount namespace of a process.
/// The kernel unmounts a directory that the host no longer has, but only on a lookup of that
/// directory.
fn revalidate_mounts(pid: i32) {
    let Ok(table) = fs::read_to_string(format!("/proc/{pid}/mountinfo")) else { return };
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    let Ok(root) = path::open_in_guest(format!("/proc/{pid}/root"), flags) else { return };
    for point in shared_points(&table) {
        // Either result means that the kernel has asked the host.
        let _ = path::open(&root, Path::new(point), OFlags::PATH | OFlags::NOFOLLOW);
    }
}

/// Mount points of the share that are reached through the share alone. The path to any other may
/// cross a file system of the container that never answers.
fn shared_points(table: &str) -> Vec<&str> {
    let mut shared = HashSet::new();
    let mut points = Vec::new();
    for line in table.lines().take(MAX_MOUNTS) {
        let mut fields = line.split(' ');
        let (Some(id), Some(parent)) = (fields.next(), fields.next()) else { continue };
        let Some(point) = fields.nth(2) else { continue };
        let kind = fields.skip_while(|field| *field != "-").nth(1);
        let in_share = point == "/" || shared.contains(parent);
        // A backslash begins the escape of a character that is rare in paths.
        if kind == Some("virtiofs") && in_share && !point.contains('\\') {
            shared.insert(id);
            points.push(point);
        }
    }
    points
}

/// Drops unused dentries and inodes from the kernel's caches.
fn drop_caches() -> Result<()> {
    // The first drop spares entries that were used since the one before.
    for _ in 0..2 {
        fs::write("/proc/sys/vm/drop_caches", "2").context(|| "drop the kernel's caches")?;
    }
    Ok(())
}

/// Drops the caches when the host asks for it.
#[derive(Debug, Default)]
pub(crate) struct CacheDrops {
    last: Mutex<Option<Instant>>,
}

impl CacheDrops {
    /// Drops the caches, unless a drop is running or very recent. `inits` are first processes of
    /// containers. Blocks.
    pub(crate) fn request(&self, inits: &[i32]) -> Result<()> {
        let mut last = match self.last.try_lock() {
            Ok(last) => last,
            Err(std::sync::TryLockError::Poisoned(poisoned)) => PoisonError::into_inner(poisoned),
            Err(std::sync::TryLockError::WouldBlock) => return Ok(()),
        };
        if last.is_some_and(|last| last.elapsed() < DROP_INTERVAL) {
            return Ok(());
        }
        inits.iter().for_each(|pid| revalidate_mounts(*pid));
        let result = drop_caches();
        *last = Some(Instant::now());
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_share_is_looked_at() {
        let table = "\
21 1 0:26 / / rw - virtiofs isopod rw
30 21 0:5 / /proc rw - proc proc rw
31 21 0:27 / /v rw - virtiofs isopod rw
32 31 0:28 / /v/sub rw master:1 - virtiofs isopod rw
33 21 0:29 / /own rw - fuse.own own rw
34 33 0:27 / /own/v rw - virtiofs isopod rw
";
        assert_eq!(shared_points(table), ["/", "/v", "/v/sub"]);
    }

    #[test]
    fn only_mounts_of_one_container_are_found() {
        let table = "\
21 1 0:1 / / rw - rootfs rootfs rw
30 21 0:25 / /run/isopod/shared rw - virtiofs isopod rw
31 30 0:26 / /run/isopod/shared/a/rootfs rw - virtiofs isopod rw
32 30 0:27 / /run/isopod/shared/ab/rootfs rw - virtiofs isopod rw
33 31 0:28 / /run/isopod/shared/a/rootfs/with\\040space rw - virtiofs isopod rw
";
        let found: Vec<_> = mount_points(table, Path::new("/run/isopod/shared/a")).collect();
        let expected =
            ["/run/isopod/shared/a/rootfs", "/run/isopod/shared/a/rootfs/with\\040space"];
        assert_eq!(found, expected.map(PathBuf::from));
    }
}

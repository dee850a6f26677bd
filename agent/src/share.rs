//! The shared directory, and what this kernel remembers of it: the host keeps a descriptor of each file
//! of the share that this kernel knows of, and its file systems busy with them.

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

/// How long the kernel may keep what it remembers after it was made to forget, unless a container has
/// been deleted: each time it also loses what it would soon need again.
const FORGET_INTERVAL: Duration = Duration::from_secs(1);

/// Most mounts of a container that are looked at: it may make as many as it likes.
const MAX_MOUNTS: usize = 1000;

/// Mounts the shared directory, which is the virtio-fs device with this tag.
///
/// # Errors
///
/// There is no such device.
pub(crate) fn attach(tag: &str) -> Result<()> {
    fs::create_dir_all(SHARED_DIR).context(|| format!("create {SHARED_DIR}"))?;
    mount(tag, SHARED_DIR, "virtiofs", MountFlags::empty(), None)
        .context(|| format!("mount the shared directory {tag:?} on {SHARED_DIR}"))
}

/// Unmounts the shared directory. It is only there once the sandbox has been set up.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn detach() -> Result<()> {
    match unmount(SHARED_DIR, UnmountFlags::DETACH) {
        Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        result => result.context(|| format!("unmount {SHARED_DIR}")),
    }
}

/// Lets go of a container's folder: what the kernel has mounted in it by itself, at the first look at a
/// directory that is a mount on the host, and what it remembers of the files.
///
/// # Errors
///
/// Something stays mounted.
pub(crate) fn release(container_id: &str) -> Result<()> {
    let folder = Path::new(SHARED_DIR).join(container_id);
    let path = "/proc/self/mountinfo";
    let table = fs::read_to_string(path).context(|| format!("read {path}"))?;
    let points: Vec<PathBuf> = mount_points(&table, &folder).collect();
    // The last first: those mounted on others.
    for point in points.iter().rev() {
        match unmount(point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            // Gone with the one that it was in.
            Err(Errno::INVAL | Errno::NOENT) => {}
            result => result.context(|| format!("unmount {}", point.display()))?,
        }
    }
    forget_files()
}

/// The mount points below a folder whose path needs no escapes.
fn mount_points<'a>(table: &'a str, folder: &'a Path) -> impl Iterator<Item = PathBuf> + 'a {
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    points.filter(move |point| point.starts_with(folder))
}

/// Has the kernel look again at what it has mounted by itself in the mount namespace of a process. It
/// takes down what is not there any more, which no other look than one at that very place makes it do.
fn look_again(pid: i32) {
    let Ok(table) = fs::read_to_string(format!("/proc/{pid}/mountinfo")) else { return };
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    let Ok(root) = path::open_in_guest(format!("/proc/{pid}/root"), flags) else { return };
    for point in shared_points(&table) {
        // Whether it is there or not, the kernel has asked.
        let _ = path::open(&root, Path::new(point), OFlags::PATH | OFlags::NOFOLLOW);
    }
}

/// The mount points of a table that lie in the share from the root on. On the way to others is a file
/// system that a container may have made not to answer.
fn shared_points(table: &str) -> Vec<&str> {
    let mut shared = HashSet::new();
    let mut points = Vec::new();
    for line in table.lines().take(MAX_MOUNTS) {
        let mut fields = line.split(' ');
        let (Some(id), Some(parent)) = (fields.next(), fields.next()) else { continue };
        let Some(point) = fields.nth(2) else { continue };
        let kind = fields.skip_while(|field| *field != "-").nth(1);
        let in_share = point == "/" || shared.contains(parent);
        // A backslash begins the escape of a character that paths seldom have.
        if kind == Some("virtiofs") && in_share && !point.contains('\\') {
            shared.insert(id);
            points.push(point);
        }
    }
    points
}

/// Has the kernel forget the files that nobody uses.
fn forget_files() -> Result<()> {
    // Twice: the first time it spares what was used since the last.
    for _ in 0..2 {
        fs::write("/proc/sys/vm/drop_caches", "2").context(|| "have the kernel forget files")?;
    }
    Ok(())
}

/// Makes the kernel forget files when the host asks for it.
#[derive(Debug, Default)]
pub(crate) struct Forgetting {
    last: Mutex<Option<Instant>>,
}

impl Forgetting {
    /// Forgets, unless that is under way or has only just been done. `inits` are processes of the
    /// containers. Blocks.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub(crate) fn forget(&self, inits: &[i32]) -> Result<()> {
        let mut last = match self.last.try_lock() {
            Ok(last) => last,
            Err(std::sync::TryLockError::Poisoned(poisoned)) => PoisonError::into_inner(poisoned),
            Err(std::sync::TryLockError::WouldBlock) => return Ok(()),
        };
        if last.is_some_and(|last| last.elapsed() < FORGET_INTERVAL) {
            return Ok(());
        }
        inits.iter().for_each(|pid| look_again(*pid));
        let result = forget_files();
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

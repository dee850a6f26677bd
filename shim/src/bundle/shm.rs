//! Shared memory of the containers of a pod: a tmpfs that an engine has made on the host. Podman and
//! containerd bind-mount it at /dev/shm, and a kubelet anywhere: an emptyDir of medium Memory.
//!
//! The guest has a tmpfs of its own in its place. The host's tmpfs would be a shared directory in
//! the guest, and a mapping of its files is not one memory for several containers.

use std::{
    fs::{self, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::fs::statfs;
use serde::{Deserialize, Serialize};

use crate::bundle::id_map::{self, IdMap};

/// The mount point of POSIX shared memory (shm_overview(7)).
pub(super) const PLACE: &str = "/dev/shm";

/// Directory of a kubelet for the emptyDir volumes of a pod, each below its name.
const EMPTY_DIRS: &str = "kubernetes.io~empty-dir";

/// Directory of a kubelet for parts of volumes (`subPath`): `VOLUME/CONTAINER/NUMBER`.
const SUBPATHS: &str = "volume-subpaths";

/// `f_type` of a tmpfs (statfs(2)).
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// A tmpfs in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shm {
    /// Key of the host's directory, the same for all containers that bind it.
    pub key: String,
    /// Size in bytes; 0 for no limit.
    pub size: u64,
    /// Permissions of the root directory.
    pub mode: u32,
    /// Owner of the root directory.
    pub uid: u32,
    /// Group of the root directory.
    pub gid: u32,
    /// Its files may be executed.
    #[serde(default)]
    pub executable: bool,
}

impl Shm {
    /// The tmpfs in place of a bind mount of `source`, if its source is a directory of a tmpfs, and
    /// it is at /dev/shm or an emptyDir. `found` is the metadata of `source`. With an id mapping the
    /// tmpfs has the owner that the mapping gives to the directory.
    pub(super) fn of(
        destination: &Path,
        source: &Path,
        found: &Metadata,
        map: Option<&IdMap>,
    ) -> io::Result<Option<Self>> {
        // Compared by components, because a destination may have double or final slashes.
        let at_its_place = destination.components().eq(Path::new(PLACE).components());
        if !found.is_dir() || !(at_its_place || is_empty_dir(source)) {
            return Ok(None);
        }
        let system = statfs(source)?;
        if system.f_type != TMPFS_MAGIC {
            return Ok(None);
        }
        let blocks = |n: u64| u64::try_from(system.f_bsize).unwrap_or(0).saturating_mul(n);
        Ok(Some(Self::in_place_of(found, blocks(system.f_blocks), map)))
    }

    /// A tmpfs of `size` bytes in place of the directory with the metadata `found`.
    pub(super) fn in_place_of(found: &Metadata, size: u64, map: Option<&IdMap>) -> Self {
        let (uid, gid) = id_map::owner(map, found);
        Self {
            key: format!("{:x}-{:x}", found.dev(), found.ino()),
            size,
            mode: found.mode() & 0o7777,
            uid,
            gid,
            executable: false,
        }
    }
}

/// Tells whether a path is the directory of a pod's emptyDir that has nothing in it: what the pod
/// writes there is in the guest.
fn is_empty_dir(path: &Path) -> bool {
    let parent = path.parent().and_then(Path::file_name);
    parent.is_some_and(|name| name == EMPTY_DIRS)
        && fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}

/// The emptyDir in memory that `source` is a part of. The guest's tmpfs has no such part.
pub(super) fn part_of_memory(source: &Path) -> io::Result<Option<PathBuf>> {
    let Some(volume) = source.ancestors().nth(2) else { return Ok(None) };
    let (Some(name), Some(parts)) = (volume.file_name(), volume.parent()) else {
        return Ok(None);
    };
    if parts.file_name().is_none_or(|parts| parts != SUBPATHS) {
        return Ok(None);
    }
    let pod = parts.parent().unwrap_or(Path::new("/"));
    let whole = pod.join("volumes").join(EMPTY_DIRS).join(name);
    if !whole.is_dir() || statfs(&whole)?.f_type != TMPFS_MAGIC {
        return Ok(None);
    }
    Ok(Some(whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_tmpfs_at_its_place_is_shared_memory() {
        let of = |destination: &str, source: &str| {
            let found = std::fs::metadata(source).unwrap();
            Shm::of(Path::new(destination), Path::new(source), &found, None).unwrap()
        };
        // /dev/shm is a tmpfs on every host.
        let shm = of("/dev/shm", "/dev/shm").unwrap();
        assert_eq!(of("/dev//shm/", "/dev/shm").as_ref(), Some(&shm));
        assert!(shm.mode & 0o1777 == 0o1777 && shm.key.contains('-'), "{shm:?}");
        assert_eq!(of("/dev/shm", "/proc"), None);
        assert_eq!(of("/dev/shm/sub", "/dev/shm"), None);
        assert_eq!(of("/data", "/dev/shm"), None);
    }

    #[test]
    fn an_empty_dir_in_memory_is_shared_memory_as_a_whole_only() {
        // /dev/shm is a tmpfs on every host.
        let pod = tempfile::tempdir_in("/dev/shm").unwrap();
        let volume = pod.path().join("volumes/kubernetes.io~empty-dir/memory");
        let part = pod.path().join("volume-subpaths/memory/web/0");
        let other = pod.path().join("volume-subpaths/secret/web/0");
        for dir in [&volume, &part, &other] {
            fs::create_dir_all(dir).unwrap();
        }
        let of = |source: &Path| {
            let found = fs::metadata(source).unwrap();
            Shm::of(Path::new("/data"), source, &found, None).unwrap()
        };
        assert!(of(&volume).is_some());
        assert_eq!(of(volume.parent().unwrap()), None);
        assert_eq!(part_of_memory(&part).unwrap(), Some(volume.clone()));
        assert_eq!(part_of_memory(&other).unwrap(), None);
        assert_eq!(part_of_memory(&volume).unwrap(), None);
        fs::write(volume.join("file"), "").unwrap();
        assert_eq!(of(&volume), None);
    }
}

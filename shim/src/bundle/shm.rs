//! Shared memory of the containers of a pod: a tmpfs that an engine has made on the host and
//! bind-mounts at /dev/shm.
//!
//! The guest has a tmpfs of its own in its place. The host's tmpfs would be a shared directory in
//! the guest, and a mapping of its files is not one memory for several containers.

use std::{fs::Metadata, io, os::unix::fs::MetadataExt, path::Path};

use rustix::fs::statfs;
use serde::{Deserialize, Serialize};

/// The mount point of POSIX shared memory (shm_overview(7)).
const PLACE: &str = "/dev/shm";

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
}

impl Shm {
    /// The tmpfs in place of a bind mount of `source`, if it is at /dev/shm and its source is a
    /// directory of a tmpfs. `found` is the metadata of `source`.
    pub(super) fn of(
        destination: &Path,
        source: &Path,
        found: &Metadata,
    ) -> io::Result<Option<Self>> {
        // Compared by components, because a destination may have double or final slashes.
        if !destination.components().eq(Path::new(PLACE).components()) || !found.is_dir() {
            return Ok(None);
        }
        let system = statfs(source)?;
        if system.f_type != TMPFS_MAGIC {
            return Ok(None);
        }
        let blocks = |n: u64| u64::try_from(system.f_bsize).unwrap_or(0).saturating_mul(n);
        Ok(Some(Self {
            key: format!("{:x}-{:x}", found.dev(), found.ino()),
            size: blocks(system.f_blocks),
            mode: found.mode() & 0o7777,
            uid: found.uid(),
            gid: found.gid(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_tmpfs_at_its_place_is_shared_memory() {
        let of = |destination: &str, source: &str| {
            let found = std::fs::metadata(source).unwrap();
            Shm::of(Path::new(destination), Path::new(source), &found).unwrap()
        };
        // /dev/shm is a tmpfs on every host.
        let shm = of("/dev/shm", "/dev/shm").unwrap();
        assert_eq!(of("/dev//shm/", "/dev/shm").as_ref(), Some(&shm));
        assert!(shm.mode & 0o1777 == 0o1777 && shm.key.contains('-'), "{shm:?}");
        assert_eq!(of("/dev/shm", "/proc"), None);
        assert_eq!(of("/dev/shm/sub", "/dev/shm"), None);
        assert_eq!(of("/data", "/dev/shm"), None);
    }
}

//! Shared memory that an engine has made on the host for the containers of a pod: a tmpfs that it
//! bind-mounts at /dev/shm. The guest has a tmpfs of its own in its place. The host's would be a shared
//! directory there, whose mappings are no memory of several containers.

use std::{fs::Metadata, io, os::unix::fs::MetadataExt, path::Path};

use rustix::fs::statfs;
use serde::{Deserialize, Serialize};

/// Where it has to be mounted (POSIX shared memory, shm_overview(7)).
const PLACE: &str = "/dev/shm";

/// `f_type` of a tmpfs (statfs(2)).
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// A tmpfs for the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shm {
    /// The same for all containers that are given the same directory of the host.
    pub key: String,
    /// In bytes; 0 for no limit.
    pub size: u64,
    /// Permissions of its root directory.
    pub mode: u32,
    /// Its root directory's owner.
    pub uid: u32,
    /// Its root directory's group.
    pub gid: u32,
}

impl Shm {
    /// What takes the place of a bind mount of `source`, which `found` tells about, if it is at the place
    /// for shared memory and from a tmpfs.
    ///
    /// # Errors
    ///
    /// If the file system of `source` tells nothing of itself.
    pub(super) fn of(
        destination: &Path,
        source: &Path,
        found: &Metadata,
    ) -> io::Result<Option<Self>> {
        // By components: a destination may have double or final slashes.
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
        // A tmpfs on every host.
        let shm = of("/dev/shm", "/dev/shm").unwrap();
        assert_eq!(of("/dev//shm/", "/dev/shm").as_ref(), Some(&shm));
        assert!(shm.mode & 0o1777 == 0o1777 && shm.key.contains('-'), "{shm:?}");
        assert_eq!(of("/dev/shm", "/proc"), None);
        assert_eq!(of("/dev/shm/sub", "/dev/shm"), None);
        assert_eq!(of("/data", "/dev/shm"), None);
    }
}

//! The host's cgroups.

use std::{fs, path::PathBuf};

/// Where cgroups are mounted.
const MOUNT_POINT: &str = "/sys/fs/cgroup";

/// The directory of this process's cgroup, where cgroups v2 alone are used.
pub(crate) fn own_path() -> Option<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = text.strip_prefix("0::/")?.lines().next()?;
    Some(PathBuf::from(MOUNT_POINT).join(own))
}

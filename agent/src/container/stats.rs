//! What a container uses, in the words of the kernel: the host takes them apart.

use std::collections::HashMap;
use std::fs;

use isopod_protocol::agent::ContainerStats;

use super::cgroup::Cgroup;
use crate::error::{Context as _, Result};

/// Interface files that tell of use and limits.
const FILES: [&str; 13] = [
    "cpu.stat",
    "cpuset.cpus.effective",
    "cpuset.mems.effective",
    "io.stat",
    "memory.current",
    "memory.events",
    "memory.max",
    "memory.peak",
    "memory.stat",
    "memory.swap.current",
    "memory.swap.max",
    "pids.current",
    "pids.max",
];

/// Reads what there is of a group, and of the network that a process of it is in.
///
/// # Errors
///
/// The group is gone.
pub(crate) fn read(cgroup: &Cgroup, pid: i32) -> Result<ContainerStats> {
    let mut files = HashMap::new();
    let path = cgroup.path();
    let entries = fs::read_dir(path).context(|| format!("list {}", path.display()))?;
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        if (FILES.contains(&&*name) || is_of_huge_pages(&name))
            && let Ok(text) = cgroup.read(&name)
        {
            files.insert(name, text);
        }
    }
    // Of a process that has ended there is none.
    let network = fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap_or_default();
    Ok(ContainerStats { cgroup_files: files, network_devices: network, ..Default::default() })
}

/// `hugetlb.2MB.current` and the like.
fn is_of_huge_pages(name: &str) -> bool {
    name.starts_with("hugetlb.")
        && (name.ends_with(".current") || name.ends_with(".max") || name.ends_with(".events"))
        && !name.contains(".rsvd.")
}

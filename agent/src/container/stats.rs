//! Statistics of a container in the kernel's own formats, which the host parses.

use std::collections::HashMap;
use std::fs;

use isopod_protocol::agent::ContainerStats;

use super::cgroup::Cgroup;
use crate::error::{Context as _, Result};

/// Interface files about use and limits.
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

/// Reads the existing files of a group, and the network statistics of a process's namespace. `None`
/// if the group has been removed, also while it was read.
pub(crate) fn read(cgroup: &Cgroup, pid: i32) -> Result<Option<ContainerStats>> {
    let mut files = HashMap::new();
    let path = cgroup.path();
    let entries = match fs::read_dir(path) {
        Err(_) if !path.exists() => return Ok(None),
        entries => entries.context(|| format!("list {}", path.display()))?,
    };
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        if (FILES.contains(&&*name) || is_of_huge_pages(&name))
            && let Ok(text) = cgroup.read(&name)
        {
            files.insert(name, text);
        }
    }
    // Files of a removed group are missing above, which must not look like a kernel without them.
    if !path.exists() {
        return Ok(None);
    }
    // The file is missing when the process has ended.
    let network = fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap_or_default();
    Ok(Some(ContainerStats { cgroup_files: files, network_devices: network, ..Default::default() }))
}

/// Returns true for `hugetlb.2MB.current` and the like.
fn is_of_huge_pages(name: &str) -> bool {
    name.starts_with("hugetlb.")
        && (name.ends_with(".current") || name.ends_with(".max") || name.ends_with(".events"))
        && !name.contains(".rsvd.")
}

//! Files of procfs that show another process's memory, files or namespaces. They are closed to
//! every guest.
//!
//! Linux requires the rights of a debugger for opening them. Processes of a container lack those
//! rights. The VMM may have them, even as the user of a request.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::fd::BorrowedFd;

use super::host::{cwd, file_system, open_at};
use super::stat::Stat;

/// Names of directory entries below `/proc/<pid>` and `/proc/<pid>/task/<tid>` that need the rights
/// of a debugger (fs/proc/base.c of Linux). They are closed in every directory of procfs.
const NAMES: [&str; 30] = [
    "attr",
    "auxv",
    "clear_refs",
    "cwd",
    "environ",
    "exe",
    "fd",
    "fdinfo",
    "fail-nth",
    "io",
    "kcore",
    "kmem",
    "kpagecgroup",
    "kpagecount",
    "kpageflags",
    "map_files",
    "maps",
    "mem",
    "ns",
    "numa_maps",
    "pagemap",
    "patch_state",
    "personality",
    "root",
    "smaps",
    "smaps_rollup",
    "stack",
    "syscall",
    "timerslack_ns",
    "wchan",
];

/// Returns true if a file or directory of this name is closed to the guest.
pub(super) fn needs_ptrace(name: &[u8]) -> bool {
    NAMES.iter().any(|closed| closed.as_bytes() == name)
}

/// Returns true if the mount itself shows a closed part of procfs, as a bind mount can have any
/// name. A mount that cannot be found counts as closed.
fn mount_needs_ptrace(mount: u64) -> bool {
    let Ok(list) = open_at(cwd(), c"/proc/self/mountinfo", libc::O_RDONLY, 0) else { return true };
    let root = root_of(BufReader::new(File::from(list)), mount);
    root.is_none_or(|root| root.split(|byte| *byte == b'/').any(needs_ptrace))
}

/// Returns the fourth field of the mount's line in mountinfo: the root of the mount in its file
/// system.
fn root_of(list: impl BufRead, mount: u64) -> Option<Vec<u8>> {
    for line in list.split(b'\n') {
        let line = line.ok()?;
        let mut fields = line.split(|byte| *byte == b' ');
        let id = fields.next().and_then(|id| std::str::from_utf8(id).ok());
        if id.and_then(|id| id.parse::<u64>().ok()) == Some(mount) {
            return fields.nth(2).map(<[u8]>::to_vec);
        }
    }
    None
}

/// Returns true if the root of a mount is closed. It may be any file of procfs, under any name.
pub(super) fn is_closed(root: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(file_system(root)? == libc::PROC_SUPER_MAGIC
        && mount_needs_ptrace(Stat::listed_mount(root)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_mounts_tells_what_a_mount_shows() {
        let list = b"21 1 0:19 / /proc rw - proc proc rw\n\
                     34 21 0:19 /1/fd /x rw,nosuid master:3 - proc proc rw\n";
        assert_eq!(root_of(&list[..], 21).as_deref(), Some(&b"/"[..]));
        assert_eq!(root_of(&list[..], 34).as_deref(), Some(&b"/1/fd"[..]));
        assert_eq!(root_of(&list[..], 3), None);
    }

    #[test]
    fn names_are_closed_and_others_are_not() {
        for name in NAMES {
            assert!(needs_ptrace(name.as_bytes()));
        }
        for name in ["", "stat", "status", "cmdline", "1", "sys", "meminfo", "task"] {
            assert!(!needs_ptrace(name.as_bytes()), "{name}");
        }
    }
}

//! Many sandboxes, one after another and several at a time: everything comes back.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;
use std::sync::atomic::{AtomicU32, Ordering};

use isopod_tests::{Scope, meminfo_kib};

/// The whole life of a container, and its bundle's end.
fn live_and_die(scope: &Scope, number: u32) {
    let container = scope.container().shell(&format!("echo {number}; exit 3"));
    let mut created = container.start_new();
    assert_eq!(created.stdout.line().unwrap(), number.to_string());
    assert_eq!(created.wait().status(), 3);
    assert_eq!(container.status(), "stopped");
    container.delete().ok();
    fs::remove_dir_all(&container.bundle.dir).unwrap();
}

/// `count` of them, four at a time.
fn four_at_a_time(scope: &Scope, count: u32) {
    let next = AtomicU32::new(0);
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return;
            }
            live_and_die(scope, number);
        }
    };
    std::thread::scope(|s| (0..4).for_each(|_| drop(s.spawn(work))));
}

/// What the kernel itself counts.
#[derive(Debug)]
struct Kernel {
    files: u64,
    processes: usize,
    mounts: usize,
    available_mib: u64,
    slab_mib: u64,
}

impl Kernel {
    fn count() -> Self {
        // Caches are no leak.
        fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
        let files = fs::read_to_string("/proc/sys/fs/file-nr").unwrap();
        let is_number = |name: &str| name.bytes().all(|b| b.is_ascii_digit());
        // Kernel threads come and go; they have no command line.
        let is_process = |name: &str| {
            is_number(name)
                && fs::read(format!("/proc/{name}/cmdline")).is_ok_and(|c| !c.is_empty())
        };
        let entries = fs::read_dir("/proc").unwrap().flatten();
        Self {
            files: files.split_whitespace().next().unwrap().parse().unwrap(),
            processes: entries.filter(|e| is_process(&e.file_name().to_string_lossy())).count(),
            mounts: fs::read_to_string("/proc/1/mounts").unwrap().lines().count(),
            available_mib: meminfo_kib("MemAvailable") / 1024,
            slab_mib: meminfo_kib("SUnreclaim") / 1024,
        }
    }
}

#[test]
fn fifty_sandboxes_leave_nothing() {
    let scope = Scope::alone();
    // What is made once and kept, such as slabs and caches, is made now.
    four_at_a_time(&scope, 8);
    scope.assert_nothing_left();
    let before = Kernel::count();
    four_at_a_time(&scope, 50);
    scope.assert_nothing_left();
    let after = Kernel::count();
    println!("before {before:?}\nafter  {after:?}");
    assert_eq!((after.processes, after.mounts), (before.processes, before.mounts));
    // The rest of the machine opens files as well; one for each sandbox would be 50.
    assert!(after.files < before.files + 25, "descriptors: {before:?} {after:?}");
    assert!(after.available_mib + 50 > before.available_mib, "memory: {before:?} {after:?}");
    assert!(after.slab_mib < before.slab_mib + 25, "kernel memory: {before:?} {after:?}");
}

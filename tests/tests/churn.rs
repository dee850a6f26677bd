//! Many sandboxes, one after another and several at a time: everything comes back.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use isopod_tests::{DEADLINE, Scope, meminfo_kib};

/// The whole life of a container, and the removal of its bundle.
fn live_and_die(scope: &Scope, number: u32) {
    let container = scope.container().shell(&format!("echo {number}; exit 3"));
    let mut created = container.start_new();
    let said = created.stdout.rest();
    let end = created.wait();
    let errors = created.stderr.so_far();
    let state = container.state();
    assert_eq!(said, format!("{number}\n"), "{end}, {errors:?}, {state}");
    assert_eq!(end.status(), 3, "{errors:?}, {state}");
    assert_eq!(state["status"], "stopped");
    container.delete().ok();
    fs::remove_dir_all(&container.bundle.dir).unwrap();
}

/// Runs `count` containers, four at a time.
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

/// Counters of the kernel itself.
#[derive(Debug)]
struct Kernel {
    files: u64,
    processes: usize,
    mounts: usize,
    available_kib: u64,
    slab_kib: u64,
}

/// The number of sandboxes in each half.
const HALF: u32 = 25;

/// The memory that a half may cost: 200 KiB for each sandbox. The least that a sandbox could leave
/// is the VMM without its guest memory, and takes more. The kernel's own counters are hardly finer.
const SLACK_KIB: u64 = HALF as u64 * 200;

/// Files that the rest of the machine may open. One for each sandbox would be [`HALF`].
const SLACK_FILES: u64 = 5;

impl Kernel {
    fn count() -> Self {
        grace_period();
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
            available_kib: meminfo_kib("MemAvailable"),
            slab_kib: meminfo_kib("SUnreclaim"),
        }
    }

    /// Returns whether next to nothing has been added since `before`.
    fn is_as(&self, before: &Self) -> bool {
        (self.processes, self.mounts) == (before.processes, before.mounts)
            && self.files <= before.files + SLACK_FILES
            && self.available_kib + SLACK_KIB >= before.available_kib
            && self.slab_kib <= before.slab_kib + SLACK_KIB
    }

    /// The count when it is as `before`, or the last count if it never is. The kernel does not
    /// report when it has freed everything that it puts off.
    fn settled(before: &Self) -> Self {
        let until = Instant::now() + DEADLINE;
        loop {
            let now = Self::count();
            if now.is_as(before) || Instant::now() > until {
                return now;
            }
            std::thread::yield_now();
        }
    }
}

/// Waits for a grace period of RCU, after which the kernel frees much of what was given back.
fn grace_period() {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: the call takes three numbers and touches no memory.
    let done = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    assert_eq!(done, 0, "membarrier: {}", std::io::Error::last_os_error());
}

#[test]
fn fifty_sandboxes_leave_nothing() {
    let scope = Scope::alone();
    // Makes the items that are made once and kept, such as slabs and caches. Items that grow with
    // the number of sandboxes up to some bound are made in the first half.
    four_at_a_time(&scope, 8);
    scope.assert_nothing_left();
    let before = Kernel::count();
    four_at_a_time(&scope, HALF);
    scope.assert_nothing_left();
    let half = Kernel::count();
    four_at_a_time(&scope, HALF);
    scope.assert_nothing_left();
    let after = Kernel::settled(&half);
    let counts = format!("before {before:?}\nhalf   {half:?}\nafter  {after:?}");
    println!("{counts}");
    assert_eq!((half.processes, half.mounts), (before.processes, before.mounts), "\n{counts}");
    assert!(after.is_as(&half), "the second half has left something:\n{counts}");
}

//! The harness itself: a leak counter that counts nothing would let every test pass.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;

use isopod_tests::subreaper::{End, Spawn, Subreaper};
use isopod_tests::{Census, Reader, Scope, runtime};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getsid};

/// The difference from `before`, as text.
fn left(scope: &Scope, before: &Census) -> String {
    scope.census().since(before).join("\n")
}

#[test]
fn an_orphan_is_counted_and_dies_with_its_scope() {
    let scope = Scope::alone();
    let before = scope.census();
    // The orphan shares no parent, session or environment with the scope.
    let script = "setsid env -i sleep 4321 >/dev/null 2>&1 </dev/null & echo $!";
    let out = scope.program(&["sh", "-c", script]).output().ok();
    let pid = out.stdout.trim();
    let found = left(&scope, &before);
    assert!(found.contains(&format!("+ process {pid} ")) && found.lines().count() == 1, "{found}");
    scope.program(&["kill", "-9", pid]).output().ok();
    scope.keeper().wait(pid.parse().unwrap(), isopod_tests::DEADLINE).unwrap();
    assert_eq!(left(&scope, &before), "");
}

/// Control-C on a terminal sends such a signal, and so does the end of a whole test run.
#[test]
fn the_keeper_takes_no_signal_that_asks_it_to_end() {
    let scope = Scope::alone();
    // An answer shows that the subreaper is set up.
    scope.program(&["true"]).output().ok();
    let pid = scope.keeper().pid();
    assert_eq!(getsid(Some(Pid::from_raw(pid))).unwrap().as_raw(), pid);
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT] {
        kill(Pid::from_raw(pid), signal).unwrap();
    }
    // Programs of the subreaper take signals as from a shell.
    let mut job = scope.program(&["sleep", "1000"]).spawn();
    scope.keeper().signal(job.pid, Signal::SIGINT as i32).unwrap();
    assert_eq!(job.wait(), End::Killed(Signal::SIGINT as i32));
    scope.keeper().signal(job.pid, Signal::SIGKILL as i32).unwrap_err();
}

#[test]
fn a_keeper_whose_test_program_is_gone_ends_and_removes_all_of_it() {
    let scope = Scope::alone();
    let dir = scope.dir().join("of-another-program");
    fs::create_dir_all(dir.join("state/container")).unwrap();
    let subreaper = Subreaper::new(&runtime().probe, &dir);
    let script = "setsid sleep 4321 >/dev/null 2>&1 </dev/null & echo $!";
    let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
    let (mut stdout, out_end) = Reader::pipe();
    let null = || fs::File::open("/dev/null").unwrap().into();
    let program = Spawn { argv, env: Default::default() };
    subreaper.spawn(program, &[null(), out_end, null()]).unwrap();
    let process = format!("/proc/{}", stdout.rest().trim());
    assert!(Path::new(&process).join("cmdline").exists());
    // A killed test program leaves only this: the closed end of its socket.
    drop(subreaper);
    assert!(!Path::new(&process).exists() && !dir.exists());
}

#[test]
fn mounts_sockets_files_and_descriptors_are_counted() {
    let scope = Scope::alone();
    let before = scope.census();
    let directory = scope.root().join("left");
    let path = directory.to_str().unwrap();
    fs::create_dir(&directory).unwrap();
    assert!(left(&scope, &before).contains(&format!("+ state {path}")));
    let listener = UnixListener::bind(directory.join("socket")).unwrap();
    assert!(left(&scope, &before).contains("+ socket "));
    let file = fs::File::create(directory.join("file")).unwrap();
    assert!(left(&scope, &before).contains("+ descriptor "));
    scope.program(&["mount", "-t", "tmpfs", "none", path]).output().ok();
    assert!(left(&scope, &before).contains("+ mount of 1: "));
    scope.program(&["umount", path]).output().ok();
    drop((listener, file));
    fs::remove_dir_all(&directory).unwrap();
    assert_eq!(left(&scope, &before), "");
}

#[test]
fn a_cgroup_is_counted() {
    let scope = Scope::alone();
    let before = scope.census();
    // On a machine with cgroup v1 the first directory is one controller's.
    let controller =
        ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"].iter().find(|p| Path::new(p).is_dir());
    let group = Path::new(controller.unwrap()).join(scope.name());
    fs::create_dir(&group).unwrap();
    let found = left(&scope, &before);
    fs::remove_dir(&group).unwrap();
    assert_eq!(found, format!("+ cgroup {}", group.display()));
    assert_eq!(left(&scope, &before), "");
}

//! A real systemd as the one who makes cgroups, in namespaces of its own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;
use std::path::{Path, PathBuf};

use isopod_tests::{Command, Job, Scope, microvm_only, skip};
use serde_json::json;

const SYSTEMD: &str = "/lib/systemd/systemd";
const ROOT: &str = "/sys/fs/cgroup";

/// Becomes systemd, in a cgroup of its own that is the root of all to it. Its parent is not in that
/// cgroup: controllers can be enabled only where there are no processes. Of the units of this machine it
/// starts none.
const BECOME: &str = r#"
    set -e
    mkdir "$1"; echo 0 > "$1/cgroup.procs"
    exec unshare --cgroup sh -c '
        set -e
        mount -t proc proc /proc
        mount -t tmpfs -o mode=755 tmpfs /run
        mount -t cgroup2 cgroup2 /sys/fs/cgroup
        mkdir -p /run/systemd/system
        printf "[Unit]\nDefaultDependencies=no\n" >/run/systemd/system/nothing.target
        exec env container=isopod "$0" --system --unit=nothing.target --log-target=null --show-status=0' "$0"
"#;

/// A systemd with its own processes, mounts and cgroups.
struct Systemd<'a> {
    scope: &'a Scope,
    parent: Job<'a>,
    pid: i32,
    cgroup: PathBuf,
}

impl<'a> Systemd<'a> {
    fn start(scope: &'a Scope) -> Self {
        let cgroup = Path::new(ROOT).join(scope.name());
        let unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount"];
        let become_it = ["sh", "-c", BECOME, SYSTEMD, cgroup.to_str().unwrap()];
        let parent = scope.program(&[&unshare[..], &become_it].concat()).spawn();
        let pid = loop {
            assert!(parent.ended().is_none(), "systemd does not start");
            // The cgroup has it alone until it makes others below.
            let inside = ["", "init.scope"].map(|below| {
                fs::read_to_string(cgroup.join(below).join("cgroup.procs")).unwrap_or_default()
            });
            let pids =
                inside.iter().flat_map(|text| text.lines()).filter_map(|pid| pid.parse().ok());
            let mut is_systemd = pids.filter(|pid: &i32| {
                fs::read_to_string(format!("/proc/{pid}/comm"))
                    .is_ok_and(|name| name == "systemd\n")
            });
            if let Some(pid) = is_systemd.next() {
                break pid;
            }
        };
        let systemd = Self { scope, parent, pid, cgroup };
        // It listens a little later.
        while systemd.program(&["systemctl", "is-system-running"]).output().stdout.is_empty() {
            assert!(systemd.parent.ended().is_none(), "systemd has ended");
        }
        systemd
    }

    /// A program in its namespaces.
    fn program(&self, argv: &[&str]) -> Command<'a> {
        let target = self.pid.to_string();
        let enter = ["nsenter", "--target", &target, "--mount", "--pid", "--cgroup", "--"];
        self.scope.program(&[&enter[..], argv].concat())
    }

    /// Ends it, with all that is in it.
    fn end(mut self) {
        self.scope.keeper().signal(self.pid, libc::SIGKILL).unwrap();
        self.parent.wait();
        self.scope.wait_for_processes();
        remove(&self.cgroup);
    }
}

/// Removes a cgroup and those below.
fn remove(dir: &Path) {
    for entry in fs::read_dir(dir).unwrap().flatten() {
        if entry.path().is_dir() {
            remove(&entry.path());
        }
    }
    fs::remove_dir(dir).unwrap();
}

/// The end of a scope is that of the container in it, which has the time to end by itself. The name of
/// the scope is one that systemd has to escape.
#[test]
fn a_scope_that_is_stopped_ends_its_container_in_order() {
    microvm_only!();
    if !Path::new(SYSTEMD).exists() || !Path::new(ROOT).join("cgroup.controllers").exists() {
        skip!("this host has no systemd, or no cgroups v2");
    }
    let scope = Scope::alone();
    let systemd = Systemd::start(&scope);
    let script = "trap 'echo heard; exit 21' TERM; echo up; while :; do sleep 1; done";
    let container = scope.container().shell(script).edit(|c| {
        c["linux"]["cgroupsPath"] = json!(format!("system.slice:isopod:a+b{}", scope.name()));
    });
    container.bundle.write();
    let runtime = isopod_tests::runtime().path.to_str().unwrap().to_owned();
    let root = scope.root();
    let bundle = container.bundle.dir.to_str().unwrap();
    let isopod = |args: &[&str]| {
        let argv = [&*runtime, "--root", root.to_str().unwrap(), "--systemd-cgroup"];
        systemd.program(&[&argv[..], args].concat()).env("ISOPOD_BOOT_TIMEOUT", "120")
    };
    let mut run = isopod(&["run", "--keep", "--bundle", bundle, &container.id]).spawn();
    run.stdout.line_with("up");
    let unit = format!("isopod-a\\x2bb{}.scope", scope.name());
    let inside =
        fs::read_to_string(systemd.cgroup.join("system.slice").join(&unit).join("cgroup.procs"));
    assert!(inside.as_ref().is_ok_and(|pids| pids.lines().count() >= 2), "{inside:?}");
    let state = fs::read_to_string(root.join(&container.id).join("state.json")).unwrap();
    let dir = format!("{ROOT}/system.slice/{unit}");
    let state: serde_json::Value = serde_json::from_str(&state).unwrap();
    assert_eq!(state["cgroup"]["dir"], json!(dir));
    systemd.program(&["systemctl", "stop", &unit]).output().ok();
    run.stdout.line_with("heard");
    assert_eq!(run.wait().status(), 21, "{}", run.stderr.so_far());
    isopod(&["delete", &container.id]).output().ok();
    systemd.end();
    scope.assert_nothing_left();
}

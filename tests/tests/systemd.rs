//! A real systemd as the maker of cgroups, in namespaces of its own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;
use std::path::{Path, PathBuf};

use isopod_tests::{Command, RunningCommand, Scope, microvm_only, skip};
use serde_json::json;

const SYSTEMD: &str = "/lib/systemd/systemd";
const ROOT: &str = "/sys/fs/cgroup";

/// Becomes the systemd of a user, which manages scopes as that of the system does. Takes the place
/// of the system's for clients, and starts no unit of this machine.
///
/// It cannot be that of the system in a PID namespace. systemd does not stop a scope in order when
/// it cannot see all of its processes. KVM's kernel threads are in the VMM's cgroup, but in no such
/// namespace.
const BECOME: &str = r#"
    set -e
    mkdir "$1"; echo 0 > "$1/cgroup.procs"
    mount -t tmpfs -o mode=755 tmpfs /run
    export XDG_RUNTIME_DIR=/run/user/0
    mkdir -p /run/systemd/system $XDG_RUNTIME_DIR/systemd/user
    ln -s $XDG_RUNTIME_DIR/systemd/private /run/systemd/private
    printf "[Unit]\nDefaultDependencies=no\n" >$XDG_RUNTIME_DIR/systemd/user/nothing.target
    exec "$0" --user --unit=nothing.target --log-target=null
"#;

/// A systemd with its own mounts and cgroups.
struct Systemd<'a> {
    scope: &'a Scope,
    job: RunningCommand<'a>,
    cgroup: PathBuf,
}

impl<'a> Systemd<'a> {
    fn start(scope: &'a Scope) -> Self {
        let cgroup = Path::new(ROOT).join(scope.name());
        let unshare = ["unshare", "--mount", "--propagation=private"];
        let become_it = ["sh", "-c", BECOME, SYSTEMD, cgroup.to_str().unwrap()];
        let job = scope.program(&[&unshare[..], &become_it].concat()).spawn();
        let mut systemd = Self { scope, job, cgroup };
        let socket = format!("/proc/{}/root/run/user/0/systemd/private", systemd.job.pid);
        while !Path::new(&socket).exists() {
            if systemd.job.ended().is_some() {
                panic!("systemd has ended: {}", systemd.job.stderr.rest());
            }
        }
        systemd
    }

    /// A program in its mount namespace.
    fn program(&self, argv: &[&str]) -> Command<'a> {
        let target = self.job.pid.to_string();
        self.scope.program(&[&["nsenter", "--target", &target, "--mount", "--"], argv].concat())
    }

    fn systemctl(&self, args: &[&str]) -> Command<'a> {
        let argv = [&["systemctl", "--user"], args].concat();
        self.program(&argv).env("XDG_RUNTIME_DIR", "/run/user/0")
    }

    /// Ends systemd and everything in its cgroup.
    fn end(mut self) {
        self.scope.keeper().signal(self.job.pid, libc::SIGKILL).unwrap();
        self.job.wait();
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

/// The end of a scope gives the container in it the time to end by itself. systemd has to escape
/// the name of this scope.
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
    let dir = systemd.cgroup.join("system.slice").join(&unit);
    let inside = fs::read_to_string(dir.join("cgroup.procs"));
    assert!(inside.as_ref().is_ok_and(|pids| pids.lines().count() >= 2), "{inside:?}");
    let state = fs::read_to_string(root.join(&container.id).join("state.json")).unwrap();
    let state: serde_json::Value = serde_json::from_str(&state).unwrap();
    assert_eq!(state["cgroup"]["dir"], json!(dir));
    systemd.systemctl(&["stop", &unit]).output().ok();
    run.stdout.line_with("heard");
    assert_eq!(run.wait().status(), 21, "{}", run.stderr.so_far());
    isopod(&["delete", &container.id]).output().ok();
    systemd.end();
    scope.assert_nothing_left();
}

//! `pause` and `resume`, and other verbs on a paused container.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;
use std::path::Path;
use std::time::Instant;

use isopod_tests::{Container, Created, DEADLINE, Scope, microvm_only, runtime, skip};
use serde_json::json;

/// Skips the test without a freezer: runc needs one to pause the host's processes.
macro_rules! needs_freezer {
    () => {
        let v2 = Path::new("/sys/fs/cgroup/cgroup.controllers");
        if !runtime().is_isopod() && !v2.exists() {
            skip!("this machine has no cgroup v2 for {}", runtime().path.display());
        }
    };
}

/// A container that counts in a file of its root file system for as long as it runs.
fn counter(scope: &Scope) -> Container<'_> {
    scope
        .container()
        .shell("trap 'exit 9' TERM; i=0; echo up; while :; do i=$((i+1)); echo $i >/count; done")
}

fn started<'a>(container: &Container<'a>) -> Created<'a> {
    let mut created = container.start_new();
    created.stdout.line_with("up");
    created
}

fn verb(container: &Container<'_>, verb: &str) {
    container.command(verb, &[]).output().ok();
}

/// Waits until the container writes on. Watches the file's time, because a count may be read half
/// written.
#[track_caller]
fn assert_counts(container: &Container<'_>) {
    let file = container.bundle.rootfs("/count");
    let modified = || fs::metadata(&file).and_then(|m| m.modified()).ok();
    let before = modified();
    wait_for(container, || modified() != before);
}

#[track_caller]
fn wait_for(container: &Container<'_>, holds: impl Fn() -> bool) {
    let until = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < until, "it does not run");
        container.status();
    }
}

#[test]
fn a_paused_container_stands_still_until_it_is_resumed() {
    needs_freezer!();
    let scope = Scope::new();
    let container = counter(&scope);
    let _created = started(&container);
    assert_counts(&container);
    verb(&container, "pause");
    assert_eq!(container.status(), "paused");
    let list = scope.runtime().args(["list", "--format", "json"]).output().ok().stdout;
    assert_eq!(serde_json::from_str::<serde_json::Value>(&list).unwrap()[0]["status"], "paused");
    // A running container would write while another microVM boots and ends.
    let file = container.bundle.rootfs("/count");
    let before = fs::metadata(&file).unwrap().modified().unwrap();
    scope.container().args(["true"]).run().ok();
    assert_eq!(fs::metadata(&file).unwrap().modified().unwrap(), before);
    verb(&container, "resume");
    assert_eq!(container.status(), "running");
    assert_counts(&container);
    container.exec(["true"]).ok();
}

#[test]
fn every_process_of_it_stands_still() {
    needs_freezer!();
    let scope = Scope::new();
    let container = scope.container().args(["sleep", "1000"]);
    let _created = container.start_new();
    let script = "while :; do echo tick; done >/ticks";
    let mut exec = container.command("exec", &["--detach"]).args(["sh", "-c", script]).spawn();
    assert_eq!(exec.wait().status(), 0);
    let file = container.bundle.rootfs("/ticks");
    let length = || fs::metadata(&file).map_or(0, |m| m.len());
    wait_for(&container, || length() > 0);
    verb(&container, "pause");
    let before = length();
    scope.container().args(["true"]).run().ok();
    assert_eq!(length(), before);
    verb(&container, "resume");
    wait_for(&container, || length() > before);
}

#[test]
fn a_paused_container_refuses_what_does_not_fit() {
    needs_freezer!();
    let scope = Scope::new();
    let container = counter(&scope);
    let _created = started(&container);
    let refused = |verb: &str, args: &[&str]| {
        let out = container.command(verb, &[]).args(args).output();
        assert_ne!(out.status, 0, "{out}");
        if runtime().is_isopod() {
            out.one_line_error(&[&container.id]);
        }
    };
    refused("resume", &[]);
    verb(&container, "pause");
    refused("exec", &["true"]);
    refused("start", &[]);
    refused("delete", &[]);
    // runc calls this a success.
    if runtime().is_isopod() {
        refused("pause", &[]);
    }
    assert_eq!(container.status(), "paused");
    verb(&container, "resume");
    container.kill("KILL").ok();
}

#[test]
fn exec_can_be_told_to_wait_for_resume() {
    microvm_only!();
    let scope = Scope::new();
    let container = counter(&scope);
    let _created = started(&container);
    verb(&container, "pause");
    let mut exec = container.command("exec", &["--ignore-paused"]).args(["echo", "hello"]).spawn();
    // The process is not started: a later look at the container returns first.
    assert_eq!(container.status(), "paused");
    assert_eq!(exec.stdout.so_far(), "");
    verb(&container, "resume");
    assert_eq!(exec.stdout.line().unwrap(), "hello");
    assert_eq!(exec.wait().status(), 0);
}

#[test]
fn a_paused_container_can_be_killed() {
    needs_freezer!();
    let scope = Scope::new();
    for all in [false, true] {
        let container = counter(&scope);
        let created = started(&container);
        verb(&container, "pause");
        let options = if all { &["--all"][..] } else { &[] };
        container.command("kill", options).args(["KILL"]).output().ok();
        assert_eq!(created.wait().status(), 128 + 9);
        assert_eq!(container.status(), "stopped");
        container.delete().ok();
        scope.assert_nothing_left();
    }
}

#[test]
fn a_paused_container_hears_other_signals_when_it_goes_on() {
    needs_freezer!();
    let scope = Scope::new();
    for options in [&[][..], &["--all"]] {
        let container = counter(&scope);
        let created = started(&container);
        verb(&container, "pause");
        container.command("kill", options).args(["TERM"]).output().ok();
        assert_eq!(container.status(), "paused");
        assert_eq!(created.ended(), None);
        verb(&container, "resume");
        assert_eq!(created.wait().status(), 9);
    }
}

#[test]
fn a_paused_container_can_be_deleted_by_force() {
    needs_freezer!();
    let scope = Scope::new();
    let container = counter(&scope);
    let created = started(&container);
    verb(&container, "pause");
    container.delete_force().ok();
    assert_eq!(created.wait().status(), 128 + 9);
    scope.assert_nothing_left();
}

#[test]
fn a_created_container_is_created_again_after_a_pause() {
    needs_freezer!();
    let scope = Scope::new();
    let container = scope.container().shell("exit 3");
    let created = container.create();
    verb(&container, "pause");
    assert_eq!(container.status(), "paused");
    assert_ne!(container.start().status, 0);
    verb(&container, "resume");
    assert_eq!(container.status(), "created");
    container.start().ok();
    assert_eq!(created.wait().status(), 3);
}

#[test]
fn a_stopped_container_cannot_be_paused() {
    let scope = Scope::new();
    let container = scope.container().args(["true"]);
    container.start_new().wait();
    for verb in ["pause", "resume"] {
        let out = container.command(verb, &[]).output();
        assert_ne!(out.status, 0, "{out}");
    }
    assert_eq!(container.status(), "stopped");
}

#[test]
fn crashes_of_a_paused_container_show_and_are_cleared() {
    microvm_only!();
    let scope = Scope::new();
    for vmm in [true, false] {
        let container = counter(&scope);
        let created = started(&container);
        verb(&container, "pause");
        let pid = if vmm { scope.child(created.pid, "isopod-vmm") } else { created.pid };
        scope.program(&["kill", "-9", &pid.to_string()]).output().ok();
        created.wait();
        let state = container.state();
        assert_eq!(state["status"], json!("stopped"), "{state}");
        assert!(state["annotations"]["dev.isopod.error"].is_string(), "{state}");
        container.command("resume", &[]).output().one_line_error(&[&container.id]);
        container.delete_force().ok();
        scope.wait_for_processes();
        scope.assert_nothing_left();
    }
}

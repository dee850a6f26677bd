//! `kill -9` of any process: it shows, no exit status is made up, and `delete --force` clears all.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;
use std::path::Path;

use isopod_tests::subreaper::End;
use isopod_tests::terminal::ConsoleSocket;
use isopod_tests::{Container, Created, DEADLINE, Scope, microvm_only};
use serde_json::{Value, json};

const VMM: &str = "isopod-vmm";

/// A container that would run on and then end with 0.
fn sleeper(scope: &Scope) -> Container<'_> {
    scope.container().args(["sleep", "1000"])
}

/// Kills a process that would run on.
fn kill_9(scope: &Scope, pid: i32) {
    scope.program(&["kill", "-9", &pid.to_string()]).output().ok();
}

/// Checks that `state` and `list` show the container as stopped, with a reason and without an exit
/// status. In its table `list` has room for one word only.
#[track_caller]
fn assert_lost(scope: &Scope, container: &Container<'_>, created: &Created<'_>) {
    created.wait();
    let state = container.state();
    assert_eq!(state["status"], "stopped", "{state}");
    let said = state["annotations"]["dev.isopod.error"].as_str();
    assert!(said.is_some_and(|s| !s.is_empty()), "{state}");
    assert_eq!(state["annotations"]["dev.isopod.exit_status"], Value::Null, "{state}");
    let list = scope.runtime().args(["list"]).output().ok();
    let line = list.stdout.lines().find(|l| l.starts_with(&container.id)).unwrap();
    assert!(line.contains("stopped") && line.contains("lost"), "{list}");
    let list = scope.runtime().args(["list", "--format", "json"]).output().ok();
    let listed: Value = serde_json::from_str(&list.stdout).unwrap();
    assert_eq!(listed, json!([state]));
    for (verb, args) in [("start", &[][..]), ("kill", &["TERM"]), ("exec", &["true"])] {
        container.command(verb, &[]).args(args).output().one_line_error(&[&container.id]);
    }
    container.delete_force().ok();
    scope.assert_nothing_left();
}

#[test]
fn the_vmm_of_a_running_container() {
    microvm_only!();
    let scope = Scope::alone();
    let container = sleeper(&scope);
    let mut created = container.start_new();
    kill_9(&scope, scope.child(created.pid, VMM));
    let end = created.wait();
    // Neither success nor a status or signal that the program could have.
    assert_eq!(end, End::Exited(255));
    let said = created.stderr.so_far();
    assert!(said.contains("VMM") && said.contains("signal 9"), "{said:?}");
    assert_lost(&scope, &container, &created);
}

#[test]
fn the_vmm_of_a_created_container() {
    microvm_only!();
    let scope = Scope::alone();
    let container = sleeper(&scope);
    let created = container.create();
    kill_9(&scope, scope.child(created.pid, VMM));
    assert_eq!(created.wait(), End::Exited(255));
    assert_lost(&scope, &container, &created);
}

/// With `--log`, as engines start it. The log goes with the container, so its standard error gets
/// the reason.
#[test]
fn the_reason_is_the_end_of_standard_error() {
    microvm_only!();
    let scope = Scope::alone();
    let log = scope.dir().join("log");
    let options = ["--detach", "--log", log.to_str().unwrap()];
    let container = scope.container().shell("echo written >&2; exec sleep 1000");
    let mut created = container.detach("run", &options);
    created.stderr.line_with("written");
    kill_9(&scope, scope.child(created.pid, VMM));
    assert_eq!(created.wait(), End::Exited(255));
    let said = created.stderr.rest();
    let reason = format!("isopod: container {}: the VMM ended without a reason", container.id);
    assert!(said.starts_with(&reason) && said.ends_with('\n'), "{said:?}");
    assert_eq!(created.stdout.rest(), "");
    assert_lost(&scope, &container, &created);

    // A container that closes its standard error and runs on is not reported as lost.
    let container = scope.container().shell("exec 2>/dev/null; exec sleep 1000");
    let mut created = container.detach("run", &options);
    assert_eq!(created.stderr.rest(), "");
    assert_eq!(container.status(), "running");
    container.delete_force().ok();
    scope.assert_nothing_left();
}

#[test]
fn the_reason_is_shown_on_the_terminal() {
    microvm_only!();
    let scope = Scope::alone();
    let console = ConsoleSocket::bind(scope.dir());
    let log = scope.dir().join("log");
    let socket = ["--console-socket", console.path(), "--log", log.to_str().unwrap()];
    let container = sleeper(&scope).edit(|c| c["process"]["terminal"] = json!(true));
    let created = container.detach("create", &socket);
    let mut terminal = console.terminal();
    container.start().ok();
    kill_9(&scope, scope.child(created.pid, VMM));
    assert_eq!(created.wait(), End::Exited(255));
    terminal.screen.line_with("the VMM ended without a reason");
    drop((terminal, console));
    assert_lost(&scope, &container, &created);
}

#[test]
fn the_sandbox_process_of_a_running_container() {
    microvm_only!();
    let scope = Scope::alone();
    let container = sleeper(&scope);
    let created = container.start_new();
    let vmm = scope.child(created.pid, VMM);
    kill_9(&scope, created.pid);
    assert_eq!(created.wait(), End::Killed(9));
    // Without the sandbox process that owns it, the microVM must not go on.
    assert!(scope.keeper().wait(vmm, DEADLINE).is_some(), "the VMM lives on");
    assert_lost(&scope, &container, &created);
}

#[test]
fn the_sandbox_process_of_a_created_container() {
    microvm_only!();
    let scope = Scope::alone();
    let container = sleeper(&scope);
    let created = container.create();
    kill_9(&scope, created.pid);
    assert_lost(&scope, &container, &created);
}

#[test]
fn both_at_once() {
    microvm_only!();
    let scope = Scope::alone();
    let container = sleeper(&scope);
    let created = container.start_new();
    let vmm = scope.child(created.pid, VMM);
    // Stopped first, so that the sandbox process does not notice the end of the VMM.
    scope.keeper().signal(created.pid, libc::SIGSTOP).unwrap();
    kill_9(&scope, vmm);
    kill_9(&scope, created.pid);
    assert_eq!(created.wait(), End::Killed(9));
    assert_lost(&scope, &container, &created);
}

/// `delete --force` of a sandbox whose processes are stopped and do not answer.
#[test]
fn delete_force_needs_nobodys_help() {
    microvm_only!();
    let scope = Scope::alone();
    for stop_vmm in [true, false] {
        let container = sleeper(&scope);
        let created = container.start_new();
        let pid = if stop_vmm { scope.child(created.pid, VMM) } else { created.pid };
        scope.program(&["kill", "-STOP", &pid.to_string()]).output().ok();
        container.delete_force().ok();
        scope.assert_nothing_left();
    }
}

/// A guest that does not answer cannot outlive SIGKILL.
#[test]
fn kill_needs_nobodys_help() {
    microvm_only!();
    let scope = Scope::alone();
    let container = sleeper(&scope);
    let created = container.start_new();
    let vmm = scope.child(created.pid, VMM);
    scope.program(&["kill", "-STOP", &vmm.to_string()]).output().ok();
    container.kill("KILL").ok();
    assert_lost(&scope, &container, &created);
}

#[test]
fn a_command_that_waits_is_told() {
    microvm_only!();
    let scope = Scope::alone();
    let container = sleeper(&scope);
    let created = container.start_new();
    let mut exec = container.command("exec", &[]).args(["sh", "-c", "echo up; sleep 1000"]).spawn();
    exec.stdout.line_with("up");
    kill_9(&scope, scope.child(created.pid, VMM));
    let end = exec.wait();
    let said = exec.stderr.so_far();
    assert!(end == End::Exited(255) && said.contains("microVM"), "{end}: {said}");
    assert_lost(&scope, &container, &created);
}

#[test]
fn run_is_told_of_a_lost_vmm() {
    microvm_only!();
    let scope = Scope::alone();
    let container = scope.container().shell("echo up; sleep 1000");
    let pid_file = container.pid_file();
    let options = ["--pid-file", pid_file.to_str().unwrap()];
    let mut run = container.command_with_bundle("run", &options).spawn();
    run.stdout.line_with("up");
    let sandbox: i32 = fs::read_to_string(&pid_file).unwrap().parse().unwrap();
    kill_9(&scope, scope.child(sandbox, VMM));
    let end = run.wait();
    let said = run.stderr.so_far();
    assert!(end == End::Exited(255) && said.contains("VMM"), "{end}: {said}");
    container.delete_force().ok();
    scope.assert_nothing_left();
}

#[test]
fn the_run_command_itself() {
    microvm_only!();
    let scope = Scope::alone();
    let container = scope.container().shell("echo up; sleep 1000");
    let mut run = container.command_with_bundle("run", &[]).spawn();
    run.stdout.line_with("up");
    kill_9(&scope, run.pid);
    assert_eq!(run.wait(), End::Killed(9));
    container.delete_force().ok();
    scope.assert_nothing_left();
}

/// At every point of the creation, a half-made container can be cleared, and ends by itself.
#[test]
fn the_create_command_at_any_moment() {
    microvm_only!();
    let scope = Scope::alone();
    type Reached<'a> = &'a dyn Fn(&Path) -> bool;
    let moments: [(&str, Reached<'_>); 6] = [
        ("its start", &|_| true),
        ("the state directory", &|state| state.exists()),
        ("the first record", &|state| state.join("state.json").exists()),
        ("the VMM's socket", &|state| state.join("vsock.sock").exists()),
        ("the VMM's process", &|state| record(state)["vmm"].is_object()),
        ("the whole container", &|state| record(state)["status"] == "created"),
    ];
    for (moment, reached) in moments {
        let container = sleeper(&scope);
        let state = scope.root().join(&container.id);
        let mut create = container.command_with_bundle("create", &[]).spawn();
        // A kill after the end of `create` is as good.
        while create.ended().is_none() && !reached(&state) {
            std::thread::yield_now();
        }
        create.kill();
        let end = create.wait();
        assert!([End::Killed(9), End::Exited(0)].contains(&end), "{moment}: {end}");
        let deleted = container.delete_force();
        scope.wait_for_processes();
        // `delete` is refused while the half-made container is ending by itself.
        if deleted.status != 0 {
            container.delete_force().ok();
        }
        scope.assert_nothing_left();
    }
}

/// The record of a container up to now.
fn record(state: &Path) -> Value {
    let text = fs::read(state.join("state.json")).unwrap_or_default();
    serde_json::from_slice(&text).unwrap_or_default()
}

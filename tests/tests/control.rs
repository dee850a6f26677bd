//! The sandbox process: its use of others' resources, and its end in every state.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;
use std::time::Instant;

use isopod_tests::terminal::ConsoleSocket;
use isopod_tests::{Container, DEADLINE, Scope, microvm_only, runtime};
use serde_json::{Value, json};

fn sleeper(scope: &Scope) -> Container<'_> {
    scope.container().args(["sleep", "1000"])
}

/// Number of descriptors or of threads of a process.
fn count(pid: i32, what: &str) -> usize {
    fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count()
}

/// Sets the limit of descriptors of a running process, soft and hard.
fn limit_descriptors(scope: &Scope, pid: i32, limit: &str) {
    let limit = format!("--nofile={limit}");
    scope.program(&["prlimit", "--pid", &pid.to_string(), &limit]).output().ok();
}

/// Returns whether a client of a socket with such a path waits to be accepted.
fn is_waited_for(path: &str) -> bool {
    let table = fs::read_to_string("/proc/net/unix").unwrap();
    // Columns: Num RefCount Protocol Flags Type St Inode Path. St 02 is SS_CONNECTING.
    table.lines().any(|line| line.ends_with(path) && line.split_whitespace().nth(5) == Some("02"))
}

/// The sandbox process keeps no descriptor and no thread of a client that has gone, not even of one
/// that waited for the container's end.
#[test]
fn no_client_leaves_anything_behind() {
    let scope = Scope::alone();
    let container = sleeper(&scope);
    let created = container.start_new();
    container.exec(["true"]).ok();
    let counts = || (count(created.pid, "fd"), count(created.pid, "task"));
    let before = counts();
    let options = ["--detach"];
    for _ in 0..8 {
        container.exec(["true"]).ok();
        assert_eq!(container.command("exec", &options).args(["true"]).spawn().wait().status(), 0);
        container.command("pause", &[]).output().ok();
        container.command("resume", &[]).output().ok();
    }
    // Several at once, with all of their streams, and some whose clients are killed.
    let start = |number: usize| {
        let script = format!("cat > /dev/null; echo end; exec sleep 0.{}", number % 5);
        let exec = container.command("exec", &[]).args(["sh", "-c", &script]).spawn();
        if number.is_multiple_of(2) {
            scope.keeper().signal(exec.pid, libc::SIGKILL).unwrap();
        }
        exec
    };
    let execs: Vec<_> = (0..6).map(start).collect();
    for mut exec in execs {
        exec.wait();
    }
    let until = Instant::now() + DEADLINE;
    // Each of the rounds would leave one.
    while counts().0 > before.0 + 2 || counts().1 > before.1 + 2 {
        assert!(Instant::now() < until, "{before:?} descriptors and threads became {:?}", counts());
    }
}

/// A container ends in whatever state its sandbox process is, and has the status of a killed one.
#[test]
fn kill_needs_no_answer() {
    let scope = Scope::alone();
    for stopped in [true, false] {
        let container = sleeper(&scope);
        let created = container.start_new();
        if stopped {
            scope.program(&["kill", "-STOP", &created.pid.to_string()]).output().ok();
        } else {
            limit_descriptors(&scope, created.pid, "3:3");
        }
        container.kill("KILL").ok();
        assert_eq!(created.wait().status(), 128 + 9);
        let state = container.state();
        assert_eq!(state["status"], "stopped", "{state}");
        assert_eq!(state["annotations"]["dev.isopod.error"], Value::Null, "{state}");
        container.delete().ok();
        scope.assert_nothing_left();
    }
}

#[test]
fn delete_force_needs_no_descriptors() {
    let scope = Scope::alone();
    let container = sleeper(&scope);
    let created = container.start_new();
    limit_descriptors(&scope, created.pid, "3:3");
    container.delete_force().ok();
    scope.assert_nothing_left();
}

/// A sandbox process without a descriptor for a connection accepts it as soon as it has one.
#[test]
fn a_verb_waits_for_descriptors() {
    let scope = Scope::alone();
    let container = sleeper(&scope);
    let created = container.start_new();
    limit_descriptors(&scope, created.pid, "3:1024");
    let mut pause = container.command("pause", &[]).spawn();
    let until = Instant::now() + DEADLINE;
    while runtime().is_isopod() && !is_waited_for("/control.sock") {
        assert!(Instant::now() < until, "{}", pause.stderr.so_far());
    }
    limit_descriptors(&scope, created.pid, "1024:1024");
    assert_eq!(pause.wait().status(), 0, "{}", pause.stderr.so_far());
    assert_eq!(container.status(), "paused");
}

/// A detached container with its terminal elsewhere keeps no stream of the caller. So the caller's
/// pipes end with the command.
#[test]
fn a_detached_container_with_a_terminal_holds_nothing() {
    let scope = Scope::alone();
    for verb in [&["create"][..], &["run", "--detach"]] {
        let console = ConsoleSocket::bind(scope.dir());
        let container = sleeper(&scope).edit(|c| c["process"]["terminal"] = json!(true));
        let options = [&verb[1..], &["--console-socket", console.path()]].concat();
        let mut created = container.detach(verb[0], &options);
        let _terminal = console.terminal();
        assert_eq!((created.stdout.rest(), created.stderr.rest()), (String::new(), String::new()));
        assert!(created.ended().is_none());

        let exec = ["--tty", "--detach", "--console-socket", console.path()];
        if verb[0] == "run" {
            let mut exec = container.command("exec", &exec).args(["sleep", "1000"]).spawn();
            let _terminal = console.terminal();
            assert_eq!((exec.stdout.rest(), exec.stderr.rest()), (String::new(), String::new()));
            assert_eq!(exec.wait().status(), 0);
        }
        container.delete_force().ok();
    }
}

/// A container of another version's isopod: verbs do not talk to it, and name the version. It can
/// be ended all the same.
#[test]
fn another_version_is_named() {
    microvm_only!();
    let scope = Scope::alone();
    for (field, readable, delete) in [
        ("/control_version", true, true),
        ("/control_version", true, false),
        ("/version", false, false),
    ] {
        let container = sleeper(&scope);
        let created = container.start_new();
        let path = scope.root().join(&container.id).join("state.json");
        let mut state: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        *state.pointer_mut(field).unwrap() = json!(999);
        fs::write(&path, state.to_string()).unwrap();
        for (verb, args) in [
            ("exec", &["true"][..]),
            ("kill", &["TERM"]),
            ("pause", &[]),
            ("ps", &[]),
            ("events", &[]),
            ("update", &["--memory", "64M"]),
        ] {
            let out = container.command(verb, &[]).args(args).output();
            out.one_line_error(&[&container.id, "999", "isopod delete --force"]);
        }
        assert_eq!(container.command("state", &[]).output().status == 0, readable);
        assert!(created.ended().is_none());
        if delete {
            container.delete_force().ok();
        } else {
            container.kill("KILL").ok();
            assert_eq!(created.wait().status(), 128 + 9);
            container.delete().ok();
        }
        scope.assert_nothing_left();
    }
}

//! The state machine of the OCI runtime specification, and the JSON of `state` and `list`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;
use std::path::Path;

use isopod_tests::{Container, Scope, microvm_only, runtime};
use serde_json::{Value, json};

fn sleeper(scope: &Scope) -> Container<'_> {
    scope.container().args(["sleep", "1000"])
}

/// Checks that a verb that does not fit the state fails in one line with the container's id, and
/// leaves the state unchanged.
#[track_caller]
fn refused(container: &Container<'_>, verb: &str, args: &[&str]) {
    let before = container.state();
    let out = container.command(verb, &[]).args(args).output();
    assert_ne!(out.status, 0, "{out}");
    if runtime().is_isopod() {
        out.one_line_error(&[&container.id]);
    }
    assert_eq!(container.state(), before, "{verb} has changed the state");
}

#[test]
fn a_container_goes_from_created_to_running_to_stopped() {
    let scope = Scope::new();
    let container = scope.container().shell("echo ran; read line; exit 4");
    let mut created = container.create();
    assert_eq!(container.status(), "created");
    assert_eq!(created.stdout.so_far(), "", "it ran before `start`");
    container.start().ok();
    assert_eq!(created.stdout.line().unwrap(), "ran");
    // Its standard input is /dev/null, so the process ends by itself.
    assert_eq!(created.wait().status(), 4);
    assert_eq!(container.status(), "stopped");
    container.delete().ok();
    assert_ne!(container.command("state", &[]).output().status, 0);
    scope.assert_nothing_left();
}

#[test]
fn state_has_what_the_specification_asks_for() {
    let scope = Scope::new();
    let container = sleeper(&scope).annotation("org.example.key", "value");
    let created = container.create();
    for status in ["created", "running"] {
        let state = container.state();
        assert!(state["ociVersion"].as_str().unwrap().starts_with("1."), "{state}");
        assert_eq!(state["id"], json!(container.id));
        assert_eq!(state["status"], json!(status));
        assert_eq!(state["pid"], json!(created.pid));
        assert_eq!(state["bundle"], json!(container.bundle.dir));
        assert_eq!(state["annotations"]["org.example.key"], json!("value"));
        if status == "created" {
            container.start().ok();
        }
    }
    container.kill("KILL").ok();
    created.wait();
    let state = container.state();
    assert_eq!((&state["status"], &state["id"]), (&json!("stopped"), &json!(container.id)));
}

#[test]
fn the_pid_lives_until_the_container_ends_and_has_its_status() {
    let scope = Scope::new();
    let container = scope.container().shell("trap 'exit 42' TERM; echo ready; sleep 1000 & wait");
    let mut created = container.create();
    let alive = || Path::new(&format!("/proc/{}", created.pid)).exists();
    assert!(alive() && created.ended().is_none());
    container.start().ok();
    assert_eq!(created.stdout.line().unwrap(), "ready");
    let alive = || Path::new(&format!("/proc/{}", created.pid)).exists();
    assert!(alive() && created.ended().is_none());
    container.kill("TERM").ok();
    assert_eq!(created.wait().status(), 42);
}

#[test]
fn a_created_container_refuses_what_does_not_fit() {
    let scope = Scope::new();
    let container = sleeper(&scope);
    let _created = container.create();
    container.kill("NOSUCHSIGNAL").one_line_error(&["NOSUCHSIGNAL"]);
    assert_ne!(container.command_with_bundle("create", &[]).output().status, 0);
    assert_ne!(container.command_with_bundle("run", &[]).output().status, 0);
    assert_eq!(container.status(), "created");
}

/// The specification refuses this, but runc allows it, and its callers rely on that.
#[test]
fn a_created_container_can_be_deleted() {
    let scope = Scope::new();
    let container = sleeper(&scope);
    let created = container.create();
    container.delete().ok();
    assert_eq!(created.wait().status(), 128 + 9);
    scope.assert_nothing_left();
}

#[test]
fn a_running_container_refuses_what_does_not_fit() {
    let scope = Scope::new();
    let container = sleeper(&scope);
    let _created = container.start_new();
    refused(&container, "start", &[]);
    refused(&container, "delete", &[]);
    assert_ne!(container.command_with_bundle("create", &[]).output().status, 0);
    assert_eq!(container.status(), "running");
    container.exec(["true"]).ok();
}

#[test]
fn a_stopped_container_refuses_what_does_not_fit() {
    let scope = Scope::new();
    let container = scope.container().args(["true"]);
    let created = container.start_new();
    assert_eq!(created.wait().status(), 0);
    refused(&container, "start", &[]);
    refused(&container, "kill", &["TERM"]);
    refused(&container, "exec", &["true"]);
    assert_ne!(container.command_with_bundle("create", &[]).output().status, 0);
    container.delete().ok();
    assert_ne!(container.delete().status, 0, "deleted twice");
    container.delete_force().ok();
}

#[test]
fn what_does_not_exist_is_an_error_that_names_it() {
    let scope = Scope::new();
    let container = sleeper(&scope);
    for (verb, args) in [
        ("state", &[][..]),
        ("start", &[]),
        ("kill", &["TERM"]),
        ("delete", &[]),
        ("exec", &["true"]),
    ] {
        let out = container.command(verb, &[]).args(args).output();
        assert_ne!(out.status, 0, "{out}");
        if runtime().is_isopod() {
            out.one_line_error(&[&container.id]);
        }
    }
    scope.assert_nothing_left();
}

#[test]
fn options_may_follow_the_id() {
    microvm_only!();
    let scope = Scope::new();
    let container = sleeper(&scope);
    container.bundle.write();
    let (bundle, pid_file) = (container.bundle.dir.to_str().unwrap(), container.pid_file());
    let options = ["--bundle", bundle, "--pid-file", pid_file.to_str().unwrap()];
    let mut job = scope.runtime().args(["create", &container.id]).args(options).spawn();
    assert_eq!(job.wait().status(), 0, "{}", job.stderr.so_far());
    container.start().ok();
    // Options after the program belong to the program.
    let out =
        scope.runtime().args(["exec", &container.id, "--cwd", "/tmp", "ls", "-d", "--", "../tmp"]);
    assert_eq!(out.output().ok().stdout, "../tmp\n");
    scope.runtime().args(["kill", &container.id, "KILL", "--all"]).output().ok();
    scope.runtime().args(["delete", &container.id, "--force"]).output().ok();
    scope.assert_nothing_left();
}

#[test]
fn list_shows_every_container() {
    let scope = Scope::new();
    let (first, second) = (sleeper(&scope), scope.container().args(["true"]));
    let (running, stopped) = (first.start_new(), second.start_new());
    stopped.wait();
    let table = scope.runtime().args(["list"]).output().ok().stdout;
    let line = |id: &str| table.lines().find(|l| l.starts_with(id)).unwrap().to_owned();
    for word in ["running", &running.pid.to_string(), first.bundle.dir.to_str().unwrap()] {
        assert!(line(&first.id).contains(word), "no {word} in {table}");
    }
    assert!(line(&second.id).contains("stopped"), "{table}");
    let json = scope.runtime().args(["list", "--format", "json"]).output().ok().stdout;
    // Members are in runc's order, which some callers show unchanged.
    assert!(json.starts_with(r#"[{"ociVersion":"#), "{json}");
    let all: Vec<Value> = serde_json::from_str(&json).unwrap();
    let status = |id: &str| all.iter().find(|c| c["id"] == id).unwrap()["status"].clone();
    assert_eq!((status(&first.id), status(&second.id)), (json!("running"), json!("stopped")));
    let ids = scope.runtime().args(["list", "--quiet"]).output().ok().stdout;
    let mut ids: Vec<&str> = ids.lines().collect();
    ids.sort_unstable();
    assert_eq!(ids, [&*first.id, &*second.id]);
}

#[test]
fn an_empty_root_lists_nothing() {
    let scope = Scope::new();
    let out = scope.runtime().args(["list", "--quiet"]).output().ok();
    assert_eq!(out.stdout, "");
}

#[test]
fn errors_go_to_the_log_as_engines_read_it() {
    let scope = Scope::new();
    let log = scope.dir().join("log.json");
    let path = runtime().path.to_str().unwrap().to_owned();
    let argv = [&*path, "--root", "/nonexistent/root", "--log", log.to_str().unwrap()];
    let out = scope.program(&argv).args(["--log-format", "json", "state", "no-such-id"]).output();
    assert_ne!(out.status, 0);
    let text = fs::read_to_string(&log).unwrap();
    let entry: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(entry["level"], json!("error"), "{text}");
    assert!(!entry["msg"].as_str().unwrap().is_empty() && entry["time"].is_string(), "{text}");
}

#[test]
fn run_detached_returns_while_the_container_runs() {
    let scope = Scope::new();
    let container = scope.container().shell("echo up; trap 'exit 11' TERM; sleep 1000 & wait");
    let mut created = container.detach("run", &["--detach"]);
    assert_eq!(created.stdout.line().unwrap(), "up");
    assert_eq!(container.status(), "running");
    container.kill("TERM").ok();
    assert_eq!(created.wait().status(), 11);
    container.delete().ok();
}

#[test]
fn delete_force_needs_no_readable_state() {
    microvm_only!();
    let scope = Scope::new();
    let container = sleeper(&scope);
    let created = container.start_new();
    let cgroup = fs::read_to_string(format!("/proc/{}/cgroup", created.pid)).unwrap();
    container.kill("KILL").ok();
    created.wait();
    fs::write(scope.root().join(&container.id).join("state.json"), "{").unwrap();
    container.delete().one_line_error(&["state.json"]);
    let said = container.delete_force().ok().stderr;
    assert!(said.contains("state.json") && said.contains("cgroup"), "{said}");
    // The cgroup stays, because only the state has its path.
    if let Some(path) = cgroup.strip_prefix("0::/") {
        fs::remove_dir(Path::new("/sys/fs/cgroup").join(path.trim_end())).unwrap();
    }
    scope.assert_nothing_left();
}

#[test]
fn delete_force_ends_whatever_runs() {
    let scope = Scope::new();
    for started in [false, true] {
        let container = sleeper(&scope);
        let created = container.create();
        if started {
            container.start().ok();
        }
        container.delete_force().ok();
        assert_eq!(created.wait().status(), 128 + 9);
        scope.assert_nothing_left();
    }
}

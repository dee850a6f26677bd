//! Views of an operator: containers of all front ends, the guest's log, the start of a sandbox.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use isopod_tests::{Command, Container, Output, Scope, microvm_only, runtime};
use serde_json::Value;

fn sleeper(scope: &Scope) -> Container<'_> {
    scope.container().args(["sleep", "1000"])
}

/// `isopod` as an operator calls it, who does not know the `--root` of a front end.
fn operator<'a>(scope: &'a Scope, args: &[&str]) -> Command<'a> {
    scope.program(&[&[&*runtime().path.to_string_lossy()], args].concat())
}

/// The entry of a container in the list of all front ends.
fn entry(scope: &Scope, id: &str) -> Option<Value> {
    let out = operator(scope, &["list", "--all", "--format", "json"]).output().ok();
    let list: Vec<Value> = serde_json::from_str(&out.stdout).unwrap();
    list.into_iter().find(|entry| entry["id"] == id)
}

#[test]
fn an_operator_finds_a_container_of_any_root() {
    microvm_only!();
    let scope = Scope::in_pod();
    let container = sleeper(&scope);
    let created = container.start_new();
    let found = entry(&scope, &container.id).expect("an entry");
    assert_eq!(found["frontEnd"], "cli");
    assert_eq!((&found["namespace"], &found["pid"]), (&Value::Null, &created.pid.into()));
    assert_eq!(found["root"], scope.root().canonicalize().unwrap().to_str().unwrap());
    assert_eq!(found["status"], "running");
    // It is a container of a pod.
    let pod = found["sandbox"].as_str().unwrap();
    assert_ne!(pod, container.id);
    assert_eq!(entry(&scope, pod).expect("the pod")["sandbox"], pod);
    let table = operator(&scope, &["list", "-a"]).output().ok().stdout;
    let line = table.lines().find(|line| line.contains(&container.id)).expect("a line");
    let columns: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(columns[..6], ["cli", "-", pod, &container.id, &created.pid.to_string(), "running"]);
    // The caller's own root stays what runc has.
    let own = scope.runtime().args(["list", "--quiet"]).output().ok().stdout;
    assert!(own.lines().any(|line| line == container.id), "{own}");
    container.delete_force().ok();
    assert_eq!(entry(&scope, &container.id), None);
    let out = operator(&scope, &["timeline", &container.id]).output();
    out.one_line_error(&["container does not exist", &container.id]);
}

fn timeline(scope: &Scope, args: &[&str]) -> Output {
    operator(scope, &[&["timeline"], args].concat()).env("LC_ALL", "C").output()
}

/// The steps of a chart: part, and the rest of the line.
fn parts(chart: &str) -> Vec<&str> {
    chart.lines().skip(2).filter_map(|line| line.split_whitespace().next()).collect()
}

#[test]
fn the_start_of_a_sandbox_is_drawn_while_it_runs() {
    microvm_only!();
    let scope = Scope::alone();
    let container = sleeper(&scope);
    let parameters = ("ISOPOD_KERNEL_PARAMS", "loglevel=7");
    let root = scope.root();
    let debug = ["--debug", "--root", root.to_str().unwrap()];
    container.bundle.write();
    let bundle = container.bundle.dir.to_str().unwrap().to_owned();
    let create = ["create", "--bundle", &bundle, &container.id];
    let create = operator(&scope, &[&debug[..], &create].concat()).env(parameters.0, parameters.1);
    let mut create = create.env("ISOPOD_BOOT_TIMEOUT", "120").spawn();
    assert_eq!(create.wait().status(), 0, "{}", create.stderr.so_far());

    let chart = timeline(&scope, &[&container.id]).ok().stdout;
    let microvm = ["host", "host", "host", "VMM", "kernel", "agent", "container"];
    assert_eq!(parts(&chart), [&microvm[..], &["guest:"]].concat(), "{chart}");
    assert!(chart.contains("to its creation"), "{chart}");
    container.start().ok();
    let chart = timeline(&scope, &[&container.id]).ok().stdout;
    assert_eq!(parts(&chart), [&microvm[..], &["container", "guest:"]].concat(), "{chart}");
    assert!(chart.contains("to the start of its process") && chart.contains('#'), "{chart}");

    let drawing = timeline(&scope, &["--svg", "-", &container.id]).ok().stdout;
    assert!(drawing.starts_with("<svg ") && drawing.ends_with("</svg>\n"), "{drawing}");
    assert!(drawing.contains("kernel, boot: begins at "), "{drawing}");
    let file = scope.dir().join("start.svg");
    timeline(&scope, &["--svg", file.to_str().unwrap(), &container.id]).ok();
    assert_eq!(std::fs::read_to_string(&file).unwrap(), drawing);
    timeline(&scope, &["--svg", "/no/such/start.svg", &container.id])
        .one_line_error(&["/no/such/start.svg"]);

    // The log of the guest's kernel, whole and in part.
    let whole = operator(&scope, &["logs", "--guest", &container.id]).output().ok().stdout;
    assert!(whole.contains("Run /init as init process"), "{whole}");
    let tail = ["logs", "--guest", "--tail", "2", &container.id];
    let tail = operator(&scope, &tail).output().ok().stdout;
    assert_eq!(tail.lines().count(), 2, "{tail}");
    let mut follow = operator(&scope, &["logs", "--guest", "--follow", &container.id]).spawn();
    follow.stdout.line_with("Run /init as init process");
    operator(&scope, &["logs", &container.id]).output().one_line_error(&["--guest"]);
    // An end to follow.
    container.kill("KILL").ok();
    assert_eq!(follow.wait().status(), 0, "{}", follow.stderr.so_far());
    container.delete_force().ok();
    std::fs::remove_file(&file).unwrap();
    scope.assert_nothing_left();
}

#[test]
fn a_guest_without_a_log_is_named() {
    microvm_only!();
    let scope = Scope::in_pod();
    let container = sleeper(&scope);
    let _created = container.start_new();
    let out = operator(&scope, &["logs", "--guest", &container.id]).output();
    out.one_line_error(&[&container.id, "--debug"]);
    // A container of a pod has no boot of its own.
    let chart = timeline(&scope, &[&container.id]).ok().stdout;
    assert_eq!(parts(&chart), ["host", "host", "container", "container"], "{chart}");
    assert!(chart.contains("in the microVM of "), "{chart}");
}

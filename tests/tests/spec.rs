//! `spec`: the config.json that it writes is one that runs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;

use isopod_tests::terminal::Terminal;
use isopod_tests::{DEADLINE, Output, Scope, microvm_only};
use serde_json::{Value, json};

fn spec(scope: &Scope, dir: &std::path::Path) -> Output {
    scope.runtime().args(["spec", "--bundle", dir.to_str().unwrap()]).output()
}

#[test]
fn what_it_writes_is_as_runcs_and_nothing_is_overwritten() {
    let scope = Scope::new();
    spec(&scope, scope.dir()).ok();
    let file = scope.dir().join("config.json");
    let text = fs::read_to_string(&file).unwrap();
    let config: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(config["process"]["args"], json!(["sh"]));
    assert_eq!(config["process"]["terminal"], json!(true));
    assert_eq!(config["root"], json!({ "path": "rootfs", "readonly": true }));
    assert!(config["linux"]["maskedPaths"].as_array().is_some_and(|p| !p.is_empty()), "{text}");
    let again = spec(&scope, scope.dir());
    assert_ne!(again.status, 0, "{again}");
    assert!(again.stderr.contains("config.json"), "{again}");
    assert_eq!(fs::read_to_string(&file).unwrap(), text);
    assert_ne!(spec(&scope, &scope.dir().join("none")).status, 0);
}

#[test]
fn it_runs_as_it_is() {
    microvm_only!();
    let scope = Scope::new();
    // For its root file system, in the place that the specification names.
    let container = scope.container();
    let dir = container.bundle.dir.to_str().unwrap();
    spec(&scope, &container.bundle.dir).ok();
    let (mut terminal, slave) = Terminal::open(80, 24);
    let run = ["run", "--bundle", dir, &container.id];
    let job = scope.runtime().args(run).terminal(slave).spawn();
    terminal.keys("hostname; exit 5\n");
    terminal.screen.line_with("isopod");
    let end = scope.keeper().wait(job.pid, DEADLINE).expect("it has not ended");
    assert_eq!(end.status(), 5);
}

//! `spec`: the config.json that it writes runs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use isopod_tests::terminal::Terminal;
use isopod_tests::{DEADLINE, Output, Scope, microvm_only, runtime};
use serde_json::{Value, json};

fn spec(scope: &Scope, dir: &std::path::Path) -> Output {
    scope.runtime().args(["spec", "--bundle", dir.to_str().unwrap()]).output()
}

/// The config.json that `program` writes with these arguments, without ambient capabilities, names
/// and versions.
fn written(scope: &Scope, program: &[&str]) -> Value {
    let dir = scope.dir().join("written");
    fs::create_dir(&dir).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
    let options = ["spec", "--rootless", "--bundle", dir.to_str().unwrap()];
    scope.program(&[program, &options].concat()).output().ok();
    let mut config: Value =
        serde_json::from_str(&fs::read_to_string(dir.join("config.json")).unwrap()).unwrap();
    config["process"]["capabilities"].as_object_mut().unwrap().remove("ambient");
    for field in ["ociVersion", "hostname"] {
        config.as_object_mut().unwrap().remove(field);
    }
    fs::remove_dir_all(dir).unwrap();
    config
}

#[test]
fn without_roots_rights_it_is_runcs_too() {
    microvm_only!();
    let scope = Scope::new();
    let isopod = runtime().path.to_string_lossy();
    for user in [&["setpriv", "--reuid=1000", "--regid=100", "--clear-groups"][..], &[]] {
        let (own, runcs) = (
            written(&scope, &[user, &[&isopod]].concat()),
            written(&scope, &[user, &["runc"]].concat()),
        );
        assert_eq!(own, runcs);
        assert_eq!(
            own["linux"]["uidMappings"][0]["hostID"],
            json!(if user.is_empty() { 0 } else { 1000 })
        );
    }
}

#[test]
fn what_is_for_users_without_rights_runs_for_root() {
    microvm_only!();
    let scope = Scope::new();
    let container = scope.container();
    let dir = container.bundle.dir.to_str().unwrap();
    scope.runtime().args(["spec", "--rootless", "--bundle", dir]).output().ok();
    let (mut terminal, slave) = Terminal::open(80, 24);
    let job = scope.runtime().args(["run", "--bundle", dir, &container.id]).terminal(slave).spawn();
    terminal.keys("cat /proc/self/uid_map; ls -d /sys/class /sys/fs/cgroup; exit 5\n");
    let map = terminal.screen.line_with(" 0 ");
    assert_eq!(map.split_whitespace().collect::<Vec<_>>(), ["0", "0", "1"]);
    terminal.screen.line_with("/sys/fs/cgroup");
    let end = scope.keeper().wait(job.pid, DEADLINE).expect("it has not ended");
    assert_eq!(end.status(), 5);
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
    // Only for its root file system, at the path that the specification names.
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

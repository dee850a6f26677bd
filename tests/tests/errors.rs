//! Every way to fail: one line that names the cause and the remedy, and nothing left behind. For an
//! unusable config.json the remedy is the name of the field to change.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;

use isopod_tests::{Command, Container, Output, Scope, microvm_only, runtime, skip};
use serde_json::{Value, json};

/// Checks that the command fails in one line with these words, and leaves nothing.
#[track_caller]
fn refused(scope: &Scope, command: Command<'_>, words: &[&str]) -> Output {
    let out = command.output();
    assert_ne!(out.status, 0, "{out}");
    // The words are Isopod's. Any runtime has to fail and to leave nothing.
    if runtime().is_isopod() {
        out.one_line_error(words);
    }
    assert_eq!(out.stdout, "", "{out}");
    scope.assert_nothing_left();
    out
}

/// Checks that `run` and `create` both refuse this config.json.
#[track_caller]
fn config_refused(change: impl Fn(&mut Value), words: &[&str]) {
    let scope = Scope::alone();
    for verb in ["run", "create"] {
        let container = scope.container().edit(&change);
        refused(&scope, container.command_with_bundle(verb, &[]), words);
    }
}

/// `run` of a good bundle with another guest kernel or image.
fn run_with<'a>(container: &Container<'a>, variable: &str, path: &str) -> Command<'a> {
    container.command_with_bundle("run", &[]).env(variable, path)
}

#[test]
fn no_bundle() {
    let scope = Scope::alone();
    for verb in ["run", "create"] {
        let command = || scope.runtime().args([verb, "--bundle"]);
        let empty = scope.dir().to_str().unwrap();
        for (path, why) in [
            ("/no/such/bundle", "no such file"),
            (empty, "config.json"),
            ("/etc/passwd", "not a directory"),
        ] {
            refused(&scope, command().args([path, "x"]), &[path, why, "--bundle"]);
        }
    }
}

#[test]
fn broken_json_is_named_with_its_line() {
    let scope = Scope::alone();
    let container = scope.container();
    let path = container.bundle.dir.join("config.json");
    let bundle = container.bundle.dir.to_str().unwrap();
    for (text, line) in [
        ("{\n  \"ociVersion\": \"1.0.2\",\n  \"process\": {,}\n}\n", "line 3"),
        ("{\n  \"ociVersion\": 7\n}\n", "line 2"),
        ("", "line 1"),
        ("[]", "config.json"),
        ("\u{0}\u{1}garbage", "line 1"),
    ] {
        fs::write(&path, text).unwrap();
        let command = scope.runtime().args(["run", "--bundle", bundle, &container.id]);
        refused(&scope, command, &["config.json", line]);
    }
}

#[test]
fn missing_rootfs() {
    let missing = json!("no-such-rootfs");
    config_refused(|c| c["root"]["path"] = missing.clone(), &["root.path", "no-such-rootfs"]);
    config_refused(|c| c["root"]["path"] = json!("/etc/passwd"), &["root.path", "/etc/passwd"]);
    config_refused(
        |c| drop(c.as_object_mut().unwrap().remove("root")),
        &["config.json has no root"],
    );
}

#[test]
fn unknown_namespace_type() {
    let unknown = json!([{ "type": "pid" }, { "type": "mount" }, { "type": "moon" }]);
    config_refused(
        |c| c["linux"]["namespaces"] = unknown.clone(),
        &["config.json", "line", "moon", "expected one of"],
    );
}

/// Engines can ask for namespaces of the host or of another container. A microVM has neither.
/// Networks are in network.rs.
#[test]
fn a_namespace_of_the_host() {
    microvm_only!();
    for kind in ["pid", "ipc"] {
        let without = |c: &mut Value| {
            c["linux"]["namespaces"].as_array_mut().unwrap().retain(|n| n["type"] != kind);
        };
        config_refused(without, &["linux.namespaces", kind, "microVM"]);
        let joined = |c: &mut Value| {
            let all = c["linux"]["namespaces"].as_array_mut().unwrap();
            all.iter_mut().find(|n| n["type"] == kind).unwrap()["path"] = json!("/proc/1/ns/x");
        };
        config_refused(joined, &["linux.namespaces", kind, "/proc/1/ns/x", "microVM"]);
    }
}

#[test]
fn nothing_to_run() {
    config_refused(|c| c["process"]["args"] = json!([]), &["process.args", "empty"]);
    config_refused(|c| drop(c.as_object_mut().unwrap().remove("process")), &["has no process"]);
    config_refused(
        |c| c["process"]["cwd"] = json!("relative"),
        &["process.cwd", "relative", "absolute"],
    );
}

#[test]
fn an_unknown_capability_is_left_out_and_named() {
    let scope = Scope::new();
    let container = scope.container().args(["true"]).capabilities(&["CAP_KILL", "CAP_MOON"]);
    let out = container.run().ok();
    assert!(out.stderr.contains("CAP_MOON") && !out.stderr.contains("CAP_KILL"), "{out}");
}

#[test]
fn what_does_not_exist_in_the_kernel_is_named() {
    config_refused(
        |c| c["process"]["rlimits"] = json!([{ "type": "RLIMIT_MOON", "soft": 1, "hard": 1 }]),
        &["RLIMIT_MOON", "expected"],
    );
    if !runtime().is_isopod() {
        skip!("the rest of it: runc takes any version, and leaves file systems to the kernel");
    }
    config_refused(|c| c["ociVersion"] = json!("9.0.0"), &["ociVersion", "9.0.0", "supports 1.x"]);
    let mount = json!({ "destination": "/data", "type": "moonfs", "source": "none" });
    let words = &["mounts[", "/data", "moonfs", "tmpfs", "are"];
    config_refused(|c| c["mounts"].as_array_mut().unwrap().push(mount.clone()), words);
}

#[test]
fn what_this_version_does_not_do_is_refused_by_name() {
    microvm_only!();
    let rdma = json!({ "mlx5_0": { "hcaHandles": 3 } });
    let words = &["config.json", "linux.resources.rdma", "not supported"];
    config_refused(|c| c["linux"]["resources"]["rdma"] = rdma.clone(), words);
}

#[test]
fn a_sysctl_that_fails_inside_is_named_and_the_microvm_is_gone() {
    let bad = json!({ "net.ipv4.no_such_thing": "1" });
    let words = &["linux.sysctl", "net.ipv4.no_such_thing", "not a setting"];
    config_refused(|c| c["linux"]["sysctl"] = bad.clone(), words);
}

#[test]
fn kernel_or_image_missing() {
    microvm_only!();
    let scope = Scope::alone();
    for variable in ["ISOPOD_KERNEL", "ISOPOD_INITRAMFS", "ISOPOD_VMM"] {
        let container = scope.container();
        let command = run_with(&container, variable, "/no/such/file");
        refused(&scope, command, &["is missing", "/no/such/file", variable]);
        let command = run_with(&container, variable, "/etc");
        refused(&scope, command, &["/etc", variable, "not a regular file"]);
    }
}

#[test]
fn kernel_corrupt() {
    microvm_only!();
    let scope = Scope::alone();
    let whole = fs::read(runtime().beside("vmlinux")).unwrap();
    let mut other_machine = whole.clone();
    // e_machine: AArch64.
    other_machine[18] = 0xb7;
    for (name, bytes) in [
        ("empty", &[][..]),
        ("text", b"this is no kernel\n"),
        ("header-only", &whole[..64]),
        ("truncated", &whole[..whole.len() / 2]),
        ("other-machine", &other_machine),
    ] {
        let path = scope.dir().join(name);
        fs::write(&path, bytes).unwrap();
        let path = path.to_str().unwrap();
        let words = [path, "x86-64", "rebuild or reinstall the guest kernel"];
        refused(&scope, run_with(&scope.container(), "ISOPOD_KERNEL", path), &words);
    }
}

#[test]
fn image_corrupt() {
    microvm_only!();
    let scope = Scope::alone();
    let whole = fs::read(runtime().beside("isopod.initramfs")).unwrap();
    for (name, bytes) in [
        ("empty", &b""[..]),
        ("text", b"this is no image\n"),
        ("header-only", &whole[..110]),
        ("truncated", &whole[..whole.len() / 2]),
    ] {
        let path = scope.dir().join(name);
        fs::write(&path, bytes).unwrap();
        let path = path.to_str().unwrap();
        let words = [path, "rebuild or reinstall the guest image"];
        refused(&scope, run_with(&scope.container(), "ISOPOD_INITRAMFS", path), &words);
    }
}

#[test]
fn memory_larger_than_the_host_has() {
    microvm_only!();
    let scope = Scope::alone();
    let mib = (isopod_tests::host_memory_mib() * 16).min(1 << 20).to_string();
    let container = scope.container().annotation("dev.isopod.memory_mib", &mib);
    refused(&scope, container.command_with_bundle("run", &[]), &["memory", &mib, "ask for less"]);
}

#[test]
fn the_hosts_memory_runs_out() {
    microvm_only!();
    let scope = Scope::alone();
    let group = std::path::Path::new("/sys/fs/cgroup").join(scope.name());
    fs::create_dir(&group).unwrap();
    let limited = fs::write(group.join("memory.max"), (192 << 20).to_string());
    limited.expect("cgroup v2 with the memory controller is missing at /sys/fs/cgroup");
    let _ = fs::write(group.join("memory.swap.max"), "0");
    let path = format!("/{}/sandbox", scope.name());
    let container = scope.container().probe(&["eat", "1000"]);
    let container = container.edit(|c| c["linux"]["cgroupsPath"] = json!(path));
    let out = container.run();
    out.one_line_error(&["memory", "the kernel's log"]);
    assert!(!out.stdout.contains("ate"), "{out}");
    fs::remove_dir(&group).expect("processes are left in the cgroup");
    container.delete_force().ok();
    scope.assert_nothing_left();
}

#[test]
fn an_id_that_is_in_use() {
    let scope = Scope::alone();
    let container = scope.container().args(["sleep", "1000"]);
    let _created = container.start_new();
    let before = scope.census();
    for verb in ["run", "create"] {
        let out = container.command_with_bundle(verb, &[]).output();
        assert_ne!(out.status, 0, "{out}");
        if runtime().is_isopod() {
            out.one_line_error(&[&container.id, "exists", "delete it", "choose another id"]);
        }
        assert_eq!(scope.census().since(&before), [""; 0], "{verb}");
    }
    assert_eq!(container.status(), "running");
}

#[test]
fn an_id_that_cannot_be_one() {
    let scope = Scope::alone();
    let container = scope.container();
    container.bundle.write();
    let bundle = container.bundle.dir.to_str().unwrap();
    let long = "x".repeat(2000);
    for id in ["a/b", "../up", "/abs", "..", ".", "", "new\nline", "a b", &long] {
        let command = scope.runtime().args(["run", "--bundle", bundle, id]);
        let quoted = format!("id {id:?}");
        refused(&scope, command, &[&quoted, "letters, digits"]);
        let out = scope.runtime().args(["delete", "--force", id]).output();
        if runtime().is_isopod() {
            out.one_line_error(&[&quoted, "letters, digits"]);
        }
    }
    scope.assert_nothing_left();
}

#[test]
fn options_that_do_not_exist_are_named() {
    let scope = Scope::alone();
    let out = scope.runtime().args(["run", "--no-such-option", "x"]).output();
    assert!(out.status != 0 && out.stderr.contains("no-such-option"), "{out}");
    let out = scope.runtime().args(["no-such-verb"]).output();
    assert!(out.status != 0 || !runtime().is_isopod(), "{out}");
    scope.assert_nothing_left();
}

/// Programs read the log and people their terminal, so an error is in both: in the log as one line.
#[test]
fn an_error_is_in_the_log_and_on_standard_error() {
    let scope = Scope::alone();
    let log = scope.dir().join("log");
    let log_options = ["--log", log.to_str().unwrap(), "--log-format", "json"];
    let isopod = runtime().is_isopod();
    for (arguments, word) in [
        (&["state", "no-such-one"][..], "does not exist"),
        (&["exec", "no-such-one", "true"], "does not exist"),
        (&["run", "--bundle", "/no/such/bundle", "x"], "no such file"),
        (&["run", "--no-such-option", "x"], "no-such-option"),
        (&["ps", "--format", "yaml", "x"], if isopod { "yaml" } else { "" }),
    ] {
        let out = scope.runtime().args(log_options).args(arguments).output();
        assert_ne!(out.status, 0, "{out}");
        assert!(out.stderr.contains(word), "{out}");
        let text = fs::read_to_string(&log).unwrap();
        let record: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!(record["level"], "error", "{text}");
        assert!(record["msg"].as_str().unwrap().contains(word), "{text}");
        fs::remove_file(&log).unwrap();
    }
}

#[test]
fn a_list_of_a_root_that_does_not_exist_is_an_error() {
    // runc means to fail, but looks for the option in the wrong place.
    microvm_only!();
    let scope = Scope::alone();
    let path = runtime().path.to_string_lossy();
    let out = scope.program(&[&path, "--root", "/no/such/root", "list"]).output();
    out.one_line_error(&["/no/such/root", "--root"]);
    assert_eq!(scope.runtime().args(["list", "--quiet"]).output().ok().stdout, "");
}

#[test]
fn what_the_guest_leaves_out_is_in_the_log() {
    microvm_only!();
    let scope = Scope::alone();
    let log = scope.dir().join("log");
    let container = scope.container().args(["true"]);
    container.bundle.write();
    let bundle = container.bundle.dir.to_str().unwrap();
    let command = scope.runtime().args(["--log", log.to_str().unwrap()]);
    let out = command.args(["run", "--bundle", bundle, &container.id]).output().ok();
    // Most specifications have such capabilities, so the warning is in the log only.
    assert_eq!(out.stderr, "");
    let text = fs::read_to_string(&log).unwrap();
    let line = text.lines().find(|line| line.contains("process.capabilities.ambient")).unwrap();
    assert!(line.contains("level=warning") && line.contains("CAP_KILL"), "{text}");
}

//! Hooks in the container's namespaces, which are in the guest: createContainer and startContainer.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;

use isopod_tests::subreaper::End;
use isopod_tests::{Container, Scope, microvm_only, runtime};
use serde_json::{Value, json};

/// The path of the container's root for a createContainer hook.
fn root(container: &Container<'_>) -> String {
    if runtime().is_isopod() {
        return format!("/run/isopod/shared/{}/rootfs", container.id);
    }
    container.bundle.dir.join("rootfs").to_string_lossy().into_owned()
}

/// A createContainer hook that runs a shell script with the container's root as `$R`. Its static
/// program comes alone, so the script has only the commands built into the shell.
fn before_pivot(container: &Container<'_>, script: &str) -> Value {
    let script = script.replace("$R", &root(container));
    json!({ "path": "/bin/busybox", "args": ["sh", "-c", script] })
}

/// A startContainer hook that runs a shell script in the container.
fn inside(script: &str) -> Value {
    json!({ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"] })
}

/// A hook on the host.
fn on_host(script: &str) -> Value {
    json!({ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"] })
}

fn with_hooks<'a>(
    container: Container<'a>,
    hooks: impl FnOnce(&Container<'a>) -> Value,
) -> Container<'a> {
    let hooks = hooks(&container);
    container.edit(|c| c["hooks"] = hooks)
}

fn read(container: &Container<'_>, path: &str) -> String {
    let path = container.bundle.rootfs(path);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn all_six_run_in_their_order() {
    let scope = Scope::in_pod();
    let container = with_hooks(scope.container().shell("echo process >> /log"), |container| {
        let log = container.bundle.rootfs("/log");
        let note = |name: &str| json!([on_host(&format!("echo {name} >> {}", log.display()))]);
        let create =
            |n: u8| before_pivot(container, &format!("echo createContainer-{n} >> $R/log"));
        let start = |n: u8| inside(&format!("echo startContainer-{n} >> /log"));
        json!({
            "prestart": note("prestart"),
            "createRuntime": note("createRuntime"),
            "createContainer": [create(0), create(1)],
            "startContainer": [start(0), start(1)],
            "poststop": note("poststop"),
        })
    });
    let created = container.create();
    let creation = "prestart\ncreateRuntime\ncreateContainer-0\ncreateContainer-1\n";
    assert_eq!(read(&container, "/log"), creation);
    container.start().ok();
    created.wait();
    let start = "startContainer-0\nstartContainer-1\nprocess\n";
    assert_eq!(read(&container, "/log"), format!("{creation}{start}"));
    container.delete().ok();
    assert_eq!(read(&container, "/log"), format!("{creation}{start}poststop\n"));
}

#[test]
fn the_state_is_on_their_standard_input() {
    let scope = Scope::in_pod();
    let container = scope.container().annotation("org.example", "x");
    let container = with_hooks(container, |container| {
        json!({
            "createContainer": [before_pivot(container, "IFS= read -r s; echo \"$s\" > $R/creating")],
            "startContainer": [inside("cat > /created")],
        })
    });
    container.run().ok();
    for status in ["creating", "created"] {
        let state: Value = serde_json::from_str(&read(&container, status)).unwrap();
        assert!(state["ociVersion"].as_str().unwrap().starts_with("1."), "{state}");
        assert_eq!(state["id"], json!(container.id));
        assert_eq!(state["status"], json!(status));
        assert_eq!(state["bundle"], json!(container.bundle.dir));
        assert_eq!(state["annotations"]["org.example"], json!("x"));
        // The pid in the container's PID namespace.
        assert_eq!(state["pid"], json!(1));
    }
}

#[test]
fn they_run_in_the_containers_namespaces_and_as_its_process() {
    let scope = Scope::in_pod();
    let script =
        "cp -dR /proc/self/ns /tmp/X; { id -u; pwd; grep Cap /proc/self/status; } > /tmp/X-id";
    let container = scope.container().shell(&script.replace('X', "process")).edit(|c| {
        c["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
        c["process"]["cwd"] = json!("/home");
    });
    let container = with_hooks(container, |container| {
        let to = format!("{}/tmp/before", root(container));
        let before = json!({
            "path": "/bin/busybox", "args": ["cp", "-dR", "/proc/self/ns", to],
        });
        json!({
            "createContainer": [before],
            "startContainer": [inside(&script.replace('X', "hook"))],
        })
    });
    container.run().ok();
    let namespace = |who: &str, kind: &str| {
        fs::read_link(container.bundle.rootfs(&format!("/tmp/{who}/{kind}"))).unwrap()
    };
    for kind in ["mnt", "pid", "ipc", "uts", "net", "cgroup"] {
        let process = namespace("process", kind);
        assert_eq!(namespace("before", kind), process, "{kind}");
        assert_eq!(namespace("hook", kind), process, "{kind}");
    }
    let process = read(&container, "/tmp/process-id");
    assert_eq!(read(&container, "/tmp/hook-id"), process);
    assert!(process.starts_with("1000\n/home\n"), "{process}");
}

#[test]
fn arguments_and_environment_are_as_given() {
    let scope = Scope::in_pod();
    let container = with_hooks(scope.container(), |container| {
        let root = root(container);
        let hook = |args: &[&str]| json!({ "path": "/bin/busybox", "args": args, "env": ["B=2", "A=1 1"] });
        // A hook without an environment of its own has that of the container's process.
        let bare =
            |to: &str| json!({ "path": "/bin/busybox", "args": ["cp", "/proc/self/environ", to] });
        let start = json!({
            "path": "/bin/busybox",
            "args": ["cp", "/proc/self/environ", "/tmp/start"],
            "env": ["C="],
        });
        json!({
            "createContainer": [
                hook(&["cp", "/proc/self/environ", &format!("{root}/environ")]),
                hook(&["touch", &format!("{root}/two words")]),
                bare(&format!("{root}/bare")),
            ],
            "startContainer": [start, bare("/tmp/bare")],
        })
    });
    let container = container
        .args(["cp", "/proc/self/environ", "/tmp/process"])
        .edit(|c| c["process"]["env"] = json!(["PATH=/bin", "MINE=its own"]));
    container.run().ok();
    assert_eq!(read(&container, "/environ"), "B=2\0A=1 1\0");
    assert_eq!(read(&container, "/two words"), "");
    assert_eq!(read(&container, "/tmp/start"), "C=\0");
    let variables = |path: &str| {
        let mut variables: Vec<String> =
            read(&container, path).split_terminator('\0').map(str::to_owned).collect();
        variables.sort();
        variables
    };
    assert_eq!(variables("/tmp/process"), ["HOME=/root", "MINE=its own", "PATH=/bin"]);
    assert_eq!(variables("/tmp/bare"), variables("/tmp/process"));
    assert_eq!(variables("/bare"), ["MINE=its own", "PATH=/bin"]);
}

#[test]
fn one_that_fails_at_creation_undoes_it() {
    let scope = Scope::alone();
    for verb in ["create", "run"] {
        let container = with_hooks(scope.container(), |container| {
            let log = scope.dir().join("log");
            let bad = before_pivot(container, "echo to output; echo to error >&2; exit 3");
            json!({
                "createContainer": [before_pivot(container, "true"), bad],
                "poststop": [on_host(&format!("echo poststop > {}", log.display()))],
            })
        });
        let out = container.command_with_bundle(verb, &[]).output();
        assert_eq!(out.status, 1, "{out}");
        if runtime().is_isopod() {
            let words = ["hooks.createContainer[1]", "exit status 3", "to output; to error"];
            out.one_line_error(&words);
        }
        scope.assert_nothing_left();
        assert_eq!(fs::read_to_string(scope.dir().join("log")).unwrap(), "poststop\n");
        fs::remove_file(scope.dir().join("log")).unwrap();
    }
}

#[test]
fn one_that_fails_at_start_ends_the_container() {
    let scope = Scope::alone();
    let make = || {
        with_hooks(
            scope.container().shell("echo ran"),
            |_| json!({ "startContainer": [inside("echo sorry; exit 4")] }),
        )
    };
    let out = make().run();
    assert!(out.status != 0 && !out.stdout.contains("ran"), "{out}");
    if runtime().is_isopod() {
        out.one_line_error(&["hooks.startContainer[0] (/bin/sh)", "exit status 4", "sorry"]);
    }
    scope.assert_nothing_left();

    microvm_only!();
    let container = make();
    let created = container.create();
    container.start().one_line_error(&["hooks.startContainer[0] (/bin/sh)", "sorry"]);
    assert_eq!(created.wait(), End::Exited(1));
    assert_eq!(container.status(), "stopped");
    container.delete().ok();
    scope.assert_nothing_left();
}

#[test]
fn one_that_takes_too_long_is_killed() {
    microvm_only!();
    let scope = Scope::alone();
    for point in ["createContainer", "startContainer"] {
        let container = with_hooks(scope.container(), |_| {
            let mut hook = match point {
                "createContainer" => json!({ "path": "/bin/busybox", "args": ["sleep", "1000"] }),
                _ => inside("sleep 1000; true"),
            };
            hook["timeout"] = json!(1);
            json!({ (point): [hook] })
        });
        let out = container.run();
        let name = format!("hooks.{point}[0]");
        out.one_line_error(&[&name, "timeout of 1 second"]);
        scope.assert_nothing_left();
    }
}

/// The guest has neither the host's libraries nor a shell, and the error says so.
#[test]
fn what_cannot_run_in_the_guest_is_explained() {
    microvm_only!();
    let scope = Scope::alone();
    let script = scope.dir().join("script");
    fs::write(&script, "#!/bin/sh\ntrue\n").unwrap();
    scope.program(&["chmod", "755", script.to_str().unwrap()]).output().ok();
    for path in ["/bin/ls", script.to_str().unwrap()] {
        let hooks = json!({ "createContainer": [{ "path": path }] });
        let out = with_hooks(scope.container(), |_| hooks).run();
        out.one_line_error(&["hooks.createContainer[0]", "static program", "libraries"]);
        scope.assert_nothing_left();
    }
    let hooks = json!({ "createContainer": [{ "path": "/no/such" }] });
    let out = with_hooks(scope.container(), |_| hooks).run();
    out.one_line_error(&["hooks.createContainer[0]", "cannot find its program /no/such"]);
    let hooks = json!({ "startContainer": [{ "path": "/no/such" }] });
    let out = with_hooks(scope.container(), |_| hooks).run();
    out.one_line_error(&["hooks.startContainer[0] (/no/such)", "no such file"]);
    scope.assert_nothing_left();
}

#[test]
fn a_container_can_be_deleted_while_one_runs() {
    microvm_only!();
    let scope = Scope::alone();
    let container = with_hooks(
        scope.container(),
        |_| json!({ "startContainer": [inside("touch /begun; exec sleep 1000")] }),
    );
    let _created = container.create();
    let mut start = container.command("start", &[]).spawn();
    while start.ended().is_none() && !container.bundle.rootfs("/begun").exists() {
        std::thread::yield_now();
    }
    assert_eq!(container.status(), "created");
    container.delete_force().ok();
    start.wait();
    scope.wait_for_processes();
    scope.assert_nothing_left();
}

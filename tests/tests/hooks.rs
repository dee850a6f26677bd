//! Hooks: their time, place and input, and the fate of a container whose hooks fail.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;
use std::path::PathBuf;

use isopod_tests::subreaper::End;
use isopod_tests::{Container, Scope, microvm_only, runtime};
use serde_json::{Value, json};

/// The hooks that run on the host, in their order.
const ON_HOST: [&str; 4] = ["prestart", "createRuntime", "poststart", "poststop"];

/// A hook that runs a shell script on the host.
fn shell(script: &str) -> Value {
    json!({
        "path": "/bin/sh",
        "args": ["sh", "-c", script],
        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
    })
}

fn with_hooks<'a>(container: Container<'a>, hooks: &Value) -> Container<'a> {
    let hooks = hooks.clone();
    container.edit(|c| c["hooks"] = hooks)
}

/// The file in which the scope's hooks note their names.
fn log(scope: &Scope) -> PathBuf {
    scope.dir().join("log")
}

fn logged(scope: &Scope) -> Vec<String> {
    let text = fs::read_to_string(log(scope)).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// Hooks that note their names, two at each point of the host.
fn noted(scope: &Scope) -> Value {
    let note = |name: &str| shell(&format!("echo {name} >> {}", log(scope).display()));
    let at = |point: &str| json!([note(&format!("{point}-0")), note(&format!("{point}-1"))]);
    Value::Object(ON_HOST.map(|point| (point.to_owned(), at(point))).into_iter().collect())
}

/// The names that [`noted`] notes at these points.
fn both(points: &[&str]) -> Vec<String> {
    points.iter().flat_map(|point| [format!("{point}-0"), format!("{point}-1")]).collect()
}

#[test]
fn hooks_run_in_their_order_and_by_the_verb_that_they_belong_to() {
    let scope = Scope::in_pod();
    let container = with_hooks(scope.container().args(["sleep", "1000"]), &noted(&scope));
    let created = container.create();
    // runc 1.1 is known to run poststart hooks too early.
    if runtime().is_isopod() {
        assert_eq!(logged(&scope), both(&ON_HOST[..2]));
    }
    container.start().ok();
    assert_eq!(logged(&scope), both(&ON_HOST[..3]));
    container.kill("KILL").ok();
    created.wait();
    assert_eq!(logged(&scope), both(&ON_HOST[..3]));
    container.delete().ok();
    assert_eq!(logged(&scope), both(&ON_HOST));
}

#[test]
fn run_runs_all_of_them() {
    let scope = Scope::in_pod();
    let container = with_hooks(scope.container().shell("exit 3"), &noted(&scope));
    assert_eq!(container.run().status, 3);
    assert_eq!(logged(&scope), both(&ON_HOST));
    scope.assert_nothing_left();
}

#[test]
fn the_state_is_on_their_standard_input() {
    let scope = Scope::in_pod();
    let save = |point: &str| {
        let path = scope.dir().join(point);
        (point.to_owned(), json!([shell(&format!("cat > {}", path.display()))]))
    };
    let hooks = Value::Object(ON_HOST.map(save).into_iter().collect());
    let container = scope.container().args(["sleep", "1000"]).annotation("org.example", "x");
    let container = with_hooks(container, &hooks);
    let created = container.start_new();
    container.kill("KILL").ok();
    created.wait();
    container.delete().ok();
    for (point, status) in ON_HOST.into_iter().zip(["creating", "creating", "running", "stopped"]) {
        let text = fs::read_to_string(scope.dir().join(point)).unwrap();
        let state: Value = serde_json::from_str(&text).unwrap();
        assert!(state["ociVersion"].as_str().unwrap().starts_with("1."), "{state}");
        assert_eq!(state["id"], json!(container.id), "{point}");
        assert_eq!(state["bundle"], json!(container.bundle.dir), "{point}");
        assert_eq!(state["annotations"]["org.example"], json!("x"), "{point}");
        if runtime().is_isopod() || point != "poststart" {
            assert_eq!(state["status"], json!(status), "{point}");
        }
        // runc leaves a pid of 0 out.
        let pid = if point == "poststop" { 0 } else { created.pid };
        assert_eq!(state["pid"].as_i64().unwrap_or(0), i64::from(pid), "{point}");
    }
}

#[test]
fn they_run_where_the_runtime_was_called() {
    let scope = Scope::in_pod();
    let script = |point: &str| {
        format!(
            "for n in mnt net pid uts ipc cgroup; do readlink /proc/self/ns/$n; done > {0}; \
             grep 0:: /proc/self/cgroup >> {0}; pwd >> {0}",
            scope.dir().join(point).display()
        )
    };
    let hooks = ON_HOST.map(|point| (point.to_owned(), json!([shell(&script(point))])));
    let container = with_hooks(scope.container(), &Value::Object(hooks.into_iter().collect()));
    let expected = scope.program(&["sh", "-c", &script("caller")]);
    expected.output().ok();
    container.run().ok();
    let read = |name: &str| {
        let text = fs::read_to_string(scope.dir().join(name)).unwrap();
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let caller = read("caller");
    for point in ON_HOST {
        let hook = read(point);
        let (cwd, rest) = hook.split_last().unwrap();
        assert_eq!(rest, &caller[..caller.len() - 1], "{point}");
        assert_eq!(*cwd, container.bundle.dir.to_string_lossy(), "{point}");
    }
}

/// Docker up to 25 sets up the network in this hook.
#[test]
fn the_network_namespace_is_there_for_prestart() {
    let scope = Scope::in_pod();
    let path = scope.dir().join("net");
    let script = format!(
        "pid=$(sed -E 's/.*\"pid\":([0-9]+).*/\\1/'); readlink /proc/$pid/ns/net > {}",
        path.display()
    );
    let container = with_hooks(scope.container(), &json!({ "prestart": [shell(&script)] }));
    let created = container.create();
    let seen = fs::read_to_string(path).unwrap();
    let at_pid = fs::read_link(format!("/proc/{}/ns/net", created.pid)).unwrap();
    assert_eq!(seen.trim_end(), at_pid.to_string_lossy());
}

#[test]
fn arguments_and_environment_are_as_given() {
    let scope = Scope::in_pod();
    let script = scope.dir().join("hook");
    let out = scope.dir().join("out");
    let text = format!(
        "#!/bin/busybox sh\n/bin/busybox xargs -0 -n1 < /proc/$$/environ > {0}\n\
                 for a; do echo \"[$a]\" >> {0}; done\n",
        out.display()
    );
    fs::write(&script, text).unwrap();
    scope.program(&["chmod", "755", script.to_str().unwrap()]).output().ok();
    let hook = json!({ "path": script, "args": ["name", "one", "two words", ""], "env": ["B=2", "A=1 1"] });
    // A hook without an environment of its own has the command's.
    let bare = json!({ "path": "/bin/sh", "args": ["sh", "-c", format!("echo $MINE >> {}", out.display())] });
    let container = with_hooks(scope.container(), &json!({ "createRuntime": [hook, bare] }));
    container.command_with_bundle("run", &[]).env("MINE", "caller's").output().ok();
    let seen = fs::read_to_string(&out).unwrap();
    assert_eq!(seen, "B=2\nA=1 1\n[one]\n[two words]\n[]\ncaller's\n");
}

/// A hook that fails before the process runs fails the creation, and leaves nothing.
#[test]
fn a_hook_that_fails_at_creation_undoes_it() {
    for point in ["prestart", "createRuntime"] {
        let scope = Scope::alone();
        let mut hooks = noted(&scope);
        let bad = shell("echo to output; echo to error >&2; exit 3");
        hooks[point].as_array_mut().unwrap().insert(1, bad);
        for verb in ["create", "run"] {
            let _ = fs::remove_file(log(&scope));
            let container = with_hooks(scope.container(), &hooks);
            let out = container.command_with_bundle(verb, &[]).output();
            assert_eq!(out.status, 1, "{out}");
            if runtime().is_isopod() {
                let name = format!("hooks.{point}[1] (/bin/sh)");
                out.one_line_error(&[&name, "exit status 3", "to output; to error"]);
            }
            scope.assert_nothing_left();
            let mut expected = both(&ON_HOST[..if point == "prestart" { 0 } else { 1 }]);
            expected.push(format!("{point}-0"));
            expected.extend(both(&["poststop"]));
            assert_eq!(logged(&scope), expected, "{verb}");
        }
    }
}

#[test]
fn a_hook_that_does_not_exist_is_named() {
    let scope = Scope::alone();
    let hooks = json!({ "createRuntime": [{ "path": "/no/such/hook" }] });
    let out = with_hooks(scope.container(), &hooks).run();
    assert_eq!(out.status, 1, "{out}");
    if runtime().is_isopod() {
        out.one_line_error(&["hooks.createRuntime[0]", "/no/such/hook", "no such file"]);
    }
    scope.assert_nothing_left();
}

#[test]
fn a_hook_that_takes_too_long_is_killed_with_what_it_started() {
    let scope = Scope::alone();
    let mut hook = shell("sleep 1000 & sleep 1000; true");
    hook["timeout"] = json!(1);
    // runc kills only the hook, and then waits for the hook's children.
    if !runtime().is_isopod() {
        hook = json!({ "path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1 });
    }
    let out = with_hooks(scope.container(), &json!({ "createRuntime": [hook] })).run();
    assert_eq!(out.status, 1, "{out}");
    if runtime().is_isopod() {
        out.one_line_error(&["hooks.createRuntime[0]", "timeout of 1 second"]);
    }
    scope.assert_nothing_left();
}

#[test]
fn a_poststart_hook_that_fails_ends_the_container() {
    let scope = Scope::alone();
    let mut hooks = noted(&scope);
    hooks["poststart"] = json!([shell("echo sorry; exit 1"), hooks["poststart"][0]]);
    let container = with_hooks(scope.container().args(["sleep", "1000"]), &hooks);
    let out = container.run();
    assert_ne!(out.status, 0, "{out}");
    if runtime().is_isopod() {
        out.one_line_error(&["hooks.poststart[0]", "exit status 1", "sorry"]);
    }
    scope.assert_nothing_left();
    assert_eq!(logged(&scope), both(&["prestart", "createRuntime", "poststop"]));

    microvm_only!();
    fs::remove_file(log(&scope)).unwrap();
    let container = with_hooks(scope.container().args(["sleep", "1000"]), &hooks);
    let created = container.create();
    container.start().one_line_error(&["hooks.poststart[0]", "sorry"]);
    assert_eq!(created.wait(), End::Exited(1));
    let state = container.state();
    assert_eq!(state["status"], json!("stopped"));
    let why = state["annotations"]["dev.isopod.error"].as_str().unwrap();
    assert!(why.contains("hooks.poststart[0]"), "{state}");
    container.delete().ok();
    scope.assert_nothing_left();
    assert_eq!(logged(&scope), both(&["prestart", "createRuntime", "poststop"]));
}

/// As the specification demands; runc stops at the first hook that fails.
#[test]
fn a_poststop_hook_that_fails_is_no_obstacle() {
    microvm_only!();
    let scope = Scope::alone();
    let mut hooks = noted(&scope);
    hooks["poststop"].as_array_mut().unwrap().insert(0, shell("echo sorry; exit 1"));
    let out = with_hooks(scope.container(), &hooks).run().ok();
    assert!(out.stderr.contains("hooks.poststop[0]") && out.stderr.contains("sorry"), "{out}");
    assert_eq!(logged(&scope), both(&ON_HOST));
    scope.assert_nothing_left();
}

#[test]
fn poststop_hooks_run_for_a_sandbox_that_was_killed() {
    let scope = Scope::alone();
    let hooks = json!({ "poststop": noted(&scope)["poststop"] });
    let container = with_hooks(scope.container().args(["sleep", "1000"]), &hooks);
    let created = container.start_new();
    scope.program(&["kill", "-9", &created.pid.to_string()]).output().ok();
    created.wait();
    assert!(logged(&scope).is_empty());
    // Poststop hooks do without the bundle as well, because its owner may remove it.
    fs::remove_dir_all(&container.bundle.dir).unwrap();
    container.delete_force().ok();
    container.delete_force().ok();
    assert_eq!(logged(&scope), both(&["poststop"]), "once");
    scope.assert_nothing_left();
}

/// The hook never ends. A process that gives the creation up takes the hook along. After kill -9
/// the kernel ends the hook's own process.
#[test]
fn creation_can_be_given_up_while_a_hook_runs() {
    microvm_only!();
    let scope = Scope::alone();
    let begun = scope.dir().join("begun");
    for (sandbox, sleep) in [(false, "sleep 1000; true"), (true, "exec sleep 1000")] {
        let endless = shell(&format!("touch {}; {sleep}", begun.display()));
        let hooks = json!({ "prestart": [endless], "poststop": noted(&scope)["poststop"] });
        let container = with_hooks(scope.container(), &hooks);
        let mut create = container.command_with_bundle("create", &[]).spawn();
        while create.ended().is_none() && !begun.exists() {
            std::thread::yield_now();
        }
        if sandbox {
            let pid = container.state()["pid"].to_string();
            scope.program(&["kill", "-9", &pid]).output().ok();
            assert_eq!(create.wait(), End::Exited(1));
        } else {
            create.kill();
            create.wait();
        }
        scope.wait_for_processes();
        scope.assert_nothing_left();
        assert_eq!(logged(&scope), both(&["poststop"]));
        fs::remove_file(&begun).unwrap();
        fs::remove_file(log(&scope)).unwrap();
    }
}

#[test]
fn a_container_can_be_deleted_while_a_poststart_hook_runs() {
    microvm_only!();
    let scope = Scope::alone();
    let begun = scope.dir().join("begun");
    let endless = shell(&format!("touch {}; exec sleep 1000", begun.display()));
    let container = scope.container().args(["sleep", "1000"]);
    let container = with_hooks(container, &json!({ "poststart": [endless] }));
    let _created = container.create();
    let mut start = container.command("start", &[]).spawn();
    while start.ended().is_none() && !begun.exists() {
        std::thread::yield_now();
    }
    assert_eq!(container.status(), "running");
    container.delete_force().ok();
    assert_ne!(start.wait(), End::Exited(0));
    scope.wait_for_processes();
    scope.assert_nothing_left();
}

#[test]
fn what_cannot_be_a_hook_is_refused() {
    microvm_only!();
    let scope = Scope::alone();
    for (hook, words) in [
        (json!({ "path": "bin/true" }), &["path", "bin/true", "absolute"][..]),
        (json!({ "path": "/bin/true", "timeout": 0 }), &["timeout is 0", "more than 0"]),
        (json!({ "path": "/bin/true", "timeout": -5 }), &["timeout is -5"]),
        (json!({ "path": "/bin/true", "env": ["A=\0"] }), &["NUL"]),
        (json!({ "args": ["x"] }), &["config.json", "path"]),
    ] {
        for point in ON_HOST {
            let hooks = json!({ (point): [hook] });
            let out = with_hooks(scope.container(), &hooks).run();
            out.one_line_error(words);
            scope.assert_nothing_left();
        }
    }
}

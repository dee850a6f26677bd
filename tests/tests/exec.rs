//! `exec` where its container, its streams or its files get in its way.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::time::Instant;

use isopod_tests::{Container, DEADLINE, Scope, runtime};

fn sleeper(scope: &Scope) -> Container<'_> {
    scope.container().args(["sleep", "1000"])
}

#[test]
fn an_exec_ends_with_its_container() {
    let scope = Scope::new();
    for verb in ["kill", "delete"] {
        let container = sleeper(&scope);
        let created = container.start_new();
        let script = "echo up; exec sleep 1000";
        let mut exec = container.command("exec", &[]).args(["sh", "-c", script]).spawn();
        exec.stdout.line_with("up");
        let ended = if verb == "kill" { container.kill("KILL") } else { container.delete_force() };
        ended.ok();
        assert_eq!(exec.wait().status(), 128 + 9, "{verb}: {}", exec.stderr.so_far());
        assert_eq!(exec.stderr.so_far(), "", "{verb}");
        assert_eq!(created.wait().status(), 128 + 9);
    }
}

#[test]
fn a_pid_file_that_cannot_be_written_leaves_no_process() {
    let scope = Scope::new();
    let container = sleeper(&scope);
    let _created = container.start_new();
    let options = ["--detach", "--pid-file", "/no/such/directory/pid"];
    let out = container.command("exec", &options).args(["sleep", "1234"]).output();
    out.one_line_error(&["/no/such/directory/pid"]);
    let until = Instant::now() + DEADLINE;
    while container.exec(["ps"]).ok().stdout.contains("sleep 1234") {
        assert!(Instant::now() < until, "its process still runs");
    }
}

#[test]
fn the_last_of_equal_variables_counts() {
    let scope = Scope::new();
    let container = sleeper(&scope).edit(|c| c["process"]["env"] = ["PATH=/bin", "A=1"].into());
    let _created = container.start_new();
    let options = ["--env", "A=2", "--env", "B=3", "--env", "B=4"];
    let out = container.command("exec", &options).args(["sh", "-c", "echo $A $B"]).output().ok();
    assert_eq!(out.stdout, "2 4\n");
}

#[test]
fn a_process_can_be_in_a_cgroup_below_the_containers() {
    let scope = Scope::new();
    let container = scope.container().shell("mkdir -p /sys/fs/cgroup/a/b; echo up; sleep 1000");
    let container = container.edit(|c| {
        let mounts = c["mounts"].as_array_mut().unwrap();
        let cgroup = mounts.iter_mut().find(|m| m["destination"] == "/sys/fs/cgroup").unwrap();
        cgroup["options"].as_array_mut().unwrap().retain(|option| option != "ro");
    });
    let mut created = container.start_new();
    created.stdout.line_with("up");
    let exec = |path: &str| {
        container.command("exec", &["--cgroup", path]).args(["cat", "/proc/self/cgroup"]).output()
    };
    for (path, seen) in [("a", "/a"), ("/a/b", "/a/b"), ("a/../a/", "/a"), ("/", "/")] {
        assert_eq!(exec(path).ok().stdout, format!("0::{seen}\n"), "{path}");
    }
    let refused = |path: &str, words: &[&str]| {
        let out = exec(path);
        assert_ne!(out.status, 0, "{out}");
        if runtime().is_isopod() {
            out.one_line_error(words);
        }
    };
    refused("none", &["none", "no such cgroup"]);
    refused("../..", &["../..", "leads out"]);
    refused("cpu:a", &["cpu:a", "cgroup v2"]);
    // One with controllers for those below takes no processes: then the first process's is another.
    let move_down = "echo 1 > /sys/fs/cgroup/a/b/cgroup.procs && echo $$ > /sys/fs/cgroup/a/b/cgroup.procs && echo +pids > /sys/fs/cgroup/cgroup.subtree_control";
    container.exec(["sh", "-c", move_down]).ok();
    assert_eq!(container.exec(["cat", "/proc/self/cgroup"]).ok().stdout, "0::/a/b\n");
    refused("/", &["takes no processes"]);
}

//! `exec` with trouble from its container, its streams or its files.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Instant;

use isopod_tests::terminal::ConsoleSocket;
use isopod_tests::{Container, DEADLINE, Scope, microvm_only, runtime};
use serde_json::{Value, json};

fn sleeper(scope: &Scope) -> Container<'_> {
    scope.container().args(["sleep", "1000"])
}

#[test]
fn an_exec_ends_with_its_container() {
    let scope = Scope::in_pod();
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

/// A reader that has stopped reading the output of an exec keeps nobody from ending the container.
#[test]
fn a_reader_that_stops_reading_keeps_no_container() {
    let scope = Scope::alone();
    let container = sleeper(&scope);
    let created = container.start_new();
    let mut exec = container.command("exec", &[]).args(["sh", "-c", "echo up; exec yes"]).spawn();
    exec.stdout.line_with("up");
    container.kill("KILL").ok();
    assert_eq!(created.wait().status(), 128 + 9);
    container.delete().ok();
    assert_eq!(exec.wait().status(), 128 + 9, "{}", exec.stderr.so_far());
    scope.assert_nothing_left();
}

/// Nobody but the process keeps its streams open.
#[test]
fn the_end_of_its_output_is_seen_while_it_runs_on() {
    let scope = Scope::in_pod();
    let container = sleeper(&scope);
    let _created = container.start_new();
    let script = "echo last; exec >&- 2>&-; sleep 1000";
    let mut exec = container.command("exec", &[]).args(["sh", "-c", script]).spawn();
    assert_eq!(exec.stdout.rest(), "last\n");
    assert!(exec.ended().is_none());
    exec.kill();
    exec.wait();
}

#[test]
fn a_pid_file_that_cannot_be_written_leaves_no_process() {
    let scope = Scope::in_pod();
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

/// Engines kill this pid on a timeout.
#[test]
fn a_process_whose_pid_on_the_host_is_killed_ends() {
    let scope = Scope::in_pod();
    let container = sleeper(&scope);
    let _created = container.start_new();
    let runs = || container.exec(["ps"]).ok().stdout.contains("sleep 4321");
    let until = |wanted: bool| {
        let until = Instant::now() + DEADLINE;
        while runs() != wanted {
            assert!(Instant::now() < until, "its process is there: {}", !wanted);
        }
    };
    let pid_file = scope.dir().join("exec.pid");
    let detached = ["--detach", "--pid-file", pid_file.to_str().unwrap()];
    for options in [&detached[..], &[]] {
        // The pid of runc's own process is not that of the process in the container.
        if options.is_empty() && !runtime().is_isopod() {
            continue;
        }
        let mut job = container.command("exec", options).args(["sleep", "4321"]).spawn();
        let pid = if options.is_empty() {
            job.pid
        } else {
            assert_eq!(job.wait().status(), 0);
            std::fs::read_to_string(&pid_file).unwrap().parse().unwrap()
        };
        until(true);
        scope.keeper().signal(pid, libc::SIGKILL).unwrap();
        until(false);
    }
}

#[test]
fn the_last_of_equal_variables_counts() {
    let scope = Scope::in_pod();
    let container = sleeper(&scope).edit(|c| c["process"]["env"] = ["PATH=/bin", "A=1"].into());
    let _created = container.start_new();
    let options = ["--env", "A=2", "--env", "B=3", "--env", "B=4"];
    let out = container.command("exec", &options).args(["sh", "-c", "echo $A $B"]).output().ok();
    assert_eq!(out.stdout, "2 4\n");
}

#[test]
fn a_process_can_be_in_a_cgroup_below_the_containers() {
    let scope = Scope::in_pod();
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
    // A cgroup with controllers for its children takes no processes. Without `--cgroup`, `exec`
    // then uses the first process's cgroup.
    let move_down = "echo 1 > /sys/fs/cgroup/a/b/cgroup.procs && echo $$ > /sys/fs/cgroup/a/b/cgroup.procs && echo +pids > /sys/fs/cgroup/cgroup.subtree_control";
    container.exec(["sh", "-c", move_down]).ok();
    assert_eq!(container.exec(["cat", "/proc/self/cgroup"]).ok().stdout, "0::/a/b\n");
    refused("/", &["takes no processes"]);
}

#[test]
fn a_process_document_may_leave_out_what_has_a_default() {
    let scope = Scope::in_pod();
    let container = sleeper(&scope);
    let _created = container.start_new();
    let path = scope.dir().join("process.json");
    let options = ["--process", path.to_str().unwrap()];
    let exec = |document: Value| {
        fs::write(&path, document.to_string()).unwrap();
        container.command("exec", &options).output()
    };
    let script = ["sh", "-c", "pwd; id -u; id -g; ulimit -n"];
    let least = json!({ "args": script, "env": ["PATH=/bin"], "cwd": "/tmp" });
    let seen = exec(least.clone()).ok().stdout;
    assert!(seen.starts_with("/tmp\n0\n0\n"), "{seen}");
    let fields = [
        "terminal",
        "consoleSize",
        "user",
        "capabilities",
        "rlimits",
        "noNewPrivileges",
        "apparmorProfile",
        "oomScoreAdj",
        "selinuxLabel",
    ];
    let mut nulls = least.clone();
    for field in fields {
        nulls[field] = Value::Null;
    }
    assert_eq!(exec(nulls).ok().stdout, seen);
    let mut nulls = least.clone();
    nulls["user"] = json!({ "uid": null, "gid": 7, "additionalGids": null, "umask": null });
    nulls["capabilities"] = json!({ "bounding": null, "effective": [], "ambient": null });
    assert!(exec(nulls).ok().stdout.starts_with("/tmp\n0\n7\n"));
    // These errors are exec's own, so the status is none of a process in the container.
    let mut without = least;
    without.as_object_mut().unwrap().remove("cwd");
    for failed in [
        exec(without),
        container.command("exec", &["--process", "/no/such/file"]).output(),
        container.command("exec", &["--user", "nobody"]).args(["true"]).output(),
        container.command("exec", &[]).output(),
        scope.runtime().args(["exec", "no-such-container", "true"]).output(),
    ] {
        assert_eq!(failed.status, 255, "{failed}");
    }
}

#[test]
fn the_last_of_equal_options_counts() {
    let scope = Scope::new();
    let container = sleeper(&scope);
    let _created = container.start_new();
    let root = scope.root();
    let global =
        ["--root", "/no/such/root", "--root", root.to_str().unwrap(), "--debug", "--debug"];
    let path = runtime().path.to_string_lossy();
    let options = ["exec", "--cwd", "/no", "--cwd", "/tmp", "--user", "7", "--user", "1000:1000"];
    let program = [&*container.id, "sh", "-c", "pwd; id -u"];
    let out = scope.program(&[&[&*path][..], &global, &options, &program].concat()).output().ok();
    assert_eq!(out.stdout, "/tmp\n1000\n");
    let list = ["list", "--quiet", "--format", "table", "--quiet", "--format", "json"];
    let out = scope.program(&[&[&*path][..], &global, &list].concat()).output().ok();
    assert_eq!(out.stdout, format!("{}\n", container.id));
}

/// As runc from 1.2 on; Debian's is older.
#[test]
fn a_pidfd_of_the_process_comes_over_a_socket() {
    microvm_only!();
    let scope = Scope::in_pod();
    let socket = ConsoleSocket::bind(scope.dir());
    let option = ["--pidfd-socket", socket.path()];
    let pid_of = |pidfd: &OwnedFd| {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).unwrap();
        info.lines().find_map(|line| line.strip_prefix("Pid:\t")).unwrap().parse::<i32>().unwrap()
    };
    let container = sleeper(&scope);
    let created = container.detach("create", &option);
    let (pidfd, text) = socket.descriptor();
    assert_eq!((pid_of(&pidfd), &*text), (created.pid, "standard"));
    container.start().ok();
    let mut exec = container.command("exec", &option).args(["sleep", "1000"]).spawn();
    let (pidfd, text) = socket.descriptor();
    assert_eq!((pid_of(&pidfd), &*text), (exec.pid, "setns"));
    exec.kill();
    exec.wait();
    let refused = container.command("exec", &["--pidfd-socket", "/no/such/socket"]);
    refused.args(["true"]).output().one_line_error(&["/no/such/socket"]);
}

//! `ps`: the processes in the container as a table, those of the host as JSON.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;

use isopod_tests::{Scope, microvm_only, runtime};

/// The rows of the table, its heading first. The last cell is the rest of a line.
fn table(text: &str) -> Vec<Vec<String>> {
    let cells = |line: &str| {
        let mut cells: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let rest = cells.split_off(7.min(cells.len())).join(" ");
        cells.push(rest);
        cells
    };
    text.lines().map(cells).collect()
}

fn find_user<'a>(rows: &'a [Vec<String>], command: &str) -> &'a str {
    &rows.iter().find(|row| row[7].ends_with(command)).unwrap()[0]
}

#[test]
fn users_have_the_names_of_the_containers_own_passwd() {
    microvm_only!();
    let scope = Scope::in_pod();
    let volume = scope.dir().join("passwd");
    // The container's volumes count. A user without a name there is shown by its number.
    fs::write(&volume, "bob:x:1000:1000::/:\ne vil:x:7:7::/:\n").unwrap();
    let volume = volume.to_str().unwrap();
    let container = scope.container().args(["sleep", "1234"]);
    let container = container.mount("/etc/passwd", "bind", volume, &["bind", "ro"]);
    let _created = container.start_new();
    for (user, seconds) in [("1000", "4321"), ("7", "4322")] {
        let options = ["--user", user, "--detach"];
        let mut exec = container.command("exec", &options).args(["sleep", seconds]).spawn();
        assert_eq!(exec.wait().status(), 0, "{}", exec.stderr.so_far());
    }
    let out = container.command("ps", &[]).output().ok();
    let rows = table(&out.stdout);
    for (command, user) in [("sleep 1234", "0"), ("sleep 4321", "bob"), ("sleep 4322", "7")] {
        assert_eq!(find_user(&rows, command), user, "{out}");
    }
}

#[test]
fn the_table_has_the_processes_of_the_container() {
    let scope = Scope::in_pod();
    let container = scope.container().shell("sleep 1234 & echo up; wait");
    let mut created = container.start_new();
    created.stdout.line_with("up");
    let options = ["--user", "1000:1000", "--detach"];
    let mut exec = container.command("exec", &options).args(["sleep", "4321"]).spawn();
    assert_eq!(exec.wait().status(), 0, "{}", exec.stderr.so_far());
    for options in [&[][..], &["-ef"]] {
        let out = container.command("ps", &[]).args(options).output().ok();
        let rows = table(&out.stdout);
        assert_eq!(find_user(&rows, "sleep 1234"), "root", "{out}");
        assert_eq!(rows[0], ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"], "{out}");
        let find = |command: &str| rows.iter().find(|row| row[7].ends_with(command));
        let (shell, child) = (find("wait").unwrap(), find("sleep 1234").unwrap());
        assert_eq!(child[2], shell[1], "{out}");
        assert_eq!(child[5], "?", "{out}");
        let exec = find("sleep 4321").unwrap();
        assert_eq!(rows.len(), 4, "{out}");
        if runtime().is_isopod() {
            assert_eq!((&*shell[0], &*shell[1], &*shell[2]), ("root", "1", "0"), "{out}");
            assert_eq!((&*exec[0], &*exec[2]), ("alice", "0"), "{out}");
            // The pids are those that the container's own programs know.
            container.exec(["kill", "-0", &exec[1]]).ok();
        }
    }
}

#[test]
fn a_terminal_has_its_name() {
    microvm_only!();
    let scope = Scope::in_pod();
    let socket = isopod_tests::terminal::ConsoleSocket::bind(scope.dir());
    let container = scope.container().args(["sleep", "1000"]);
    let container = container.edit(|c| c["process"]["terminal"] = true.into());
    let _created = container.detach("create", &["--console-socket", socket.path()]);
    let _terminal = socket.terminal();
    container.start().ok();
    let out = container.command("ps", &[]).output().ok();
    assert_eq!(table(&out.stdout)[1][5], "pts/0", "{out}");
}

#[test]
fn json_has_pids_of_this_host() {
    let scope = Scope::new();
    let container = scope.container().args(["sleep", "1000"]);
    let created = container.start_new();
    let out = container.command("ps", &["--format", "json"]).output().ok();
    let pids: Vec<i32> = serde_json::from_str(&out.stdout).unwrap();
    assert!(pids.contains(&created.pid), "{out}");
    if runtime().is_isopod() {
        assert_eq!(pids, [created.pid, scope.child(created.pid, "isopod-vmm")]);
    }
}

#[test]
fn what_is_not_there_has_no_processes() {
    microvm_only!();
    let scope = Scope::in_pod();
    let container = scope.container().args(["true"]);
    for format in ["table", "json"] {
        let ps = || container.command("ps", &["--format", format]).output();
        ps().one_line_error(&[&container.id]);
    }
    container.start_new().wait();
    for format in ["table", "json"] {
        let ps = || container.command("ps", &["--format", format]).output();
        ps().one_line_error(&[&container.id, "not running"]);
    }
}

#[test]
fn options_that_ask_for_something_else_are_refused() {
    microvm_only!();
    let scope = Scope::in_pod();
    let container = scope.container().args(["sleep", "1000"]);
    let _created = container.start_new();
    for option in ["aux", "-o", "--forest"] {
        container.command("ps", &[]).args([option]).output().one_line_error(&[option, "exec"]);
    }
}

#[test]
fn a_container_with_very_many_processes_is_listed_whole() {
    microvm_only!();
    let scope = Scope::in_pod();
    // Each has the arguments of the first; together they are longer than an answer may be.
    let script = "mkfifo /tmp/wait; for i in $(seq 300); do (read line </tmp/wait) & done; \
                  echo up; wait";
    let container = scope.container().args(["sh", "-c", script, "sh", &"x".repeat(50_000)]);
    let mut created = container.start_new();
    created.stdout.line_with("up");
    let out = container.command("ps", &[]).output().ok();
    let shells = table(&out.stdout).iter().filter(|row| row[2] == "1").count();
    assert_eq!(shells, 300);
}

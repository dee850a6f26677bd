//! A container's first process: its status, streams, terminal and surroundings.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::DEADLINE;
use crate::engine::Run;
use crate::terminal::Terminal;

/// The client exits with the program's status, or with the engine's for a program that cannot run.
pub fn exit_statuses(run: &Run<'_>) {
    assert_eq!(run.run(&[], &["sh", "-c", "exit 7"]).status, 7);
    assert_eq!(run.ok(&["ps", "--all", "--quiet"]), "", "--rm");
    let missing = run.run(&[], &["no-such-program"]);
    assert_eq!(missing.status, 127, "{missing}");
    assert!(missing.stderr.contains("no-such-program"), "{missing}");
    let no_program = run.run(&[], &["/etc/passwd"]);
    assert_eq!(no_program.status, 126, "{no_program}");
}

/// Standard input arrives whole and ends; the two output streams stay apart.
pub fn streams(run: &Run<'_>) {
    let script = "wc -c; echo to-stderr >&2; echo to-stdout";
    let input = vec![b'x'; 300_000];
    let command = run.command("run", &["--rm", "-i"], &["sh", "-c", script]).stdin(input);
    let output = run.end(command).ok();
    assert_eq!(output.stdout, "300000\nto-stdout\n");
    assert_eq!(output.stderr, "to-stderr\n");
}

/// `-t` gives a terminal of the client's size that follows it.
pub fn terminal(run: &Run<'_>) {
    let (mut terminal, slave) = Terminal::open(91, 33);
    let command = run.command("run", &["--rm", "-i", "-t"], &["probe", "window"]).terminal(slave);
    let mut job = command.spawn();
    terminal.screen.line_with("size 91x33");
    drag(&mut terminal, 120);
    terminal.keys("\n");
    terminal.screen.line_with("bye");
    assert_eq!(job.wait().status(), 0);
}

/// Changes a terminal's size, as dragging a window's border does, until the program in the
/// container sees the change. A single change may come before the engine's client looks for any.
pub(super) fn drag(terminal: &mut Terminal, columns: u16) {
    let begun = Instant::now();
    let mut seen = String::new();
    for rows in (10..60).cycle() {
        terminal.resize(columns, rows);
        std::thread::sleep(Duration::from_millis(300));
        seen.push_str(&terminal.screen.so_far());
        if seen.contains(&format!("size {columns}x")) {
            return;
        }
        assert!(begun.elapsed() < DEADLINE, "no {columns} columns: {seen}");
    }
}

/// The process's user, directory, environment, host name and name resolution.
pub fn identity(run: &Run<'_>) {
    let options = [
        "--user=1000:1001",
        "--group-add=1002",
        "--workdir=/home",
        "--env=ONE=two words",
        "--hostname=a-host",
        "--network=bridge",
        "--dns=192.0.2.53",
        "--dns-search=example.org",
        "--add-host=other:192.0.2.7",
    ];
    let container = run.start(&options, &["sleep", "1000"]);
    let seen = container.probe(&[], &["report"]);
    assert_eq!(seen["uid"], json!([1000, 1000, 1000, 1000]));
    assert_eq!(seen["gid"], json!([1001, 1001, 1001, 1001]));
    assert!(seen["groups"].as_array().is_some_and(|g| g.contains(&json!(1002))), "{seen}");
    assert_eq!(seen["cwd"], json!("/home"));
    assert_eq!(seen["env"]["ONE"], json!("two words"));
    assert_eq!(seen["hostname"], json!("a-host"));
    let files = container.shell("cat /etc/resolv.conf /etc/hosts; cat /etc/hostname");
    for line in ["nameserver 192.0.2.53", "search example.org", "192.0.2.7\tother", "a-host"] {
        assert!(files.contains(line), "no {line:?} in {files}");
    }
    container.remove();
}

/// The kernel is the host's with runc, and the guest's own with Isopod.
pub fn kernel(run: &Run<'_>) {
    let own = run.end(run.engine.inside(&["uname", "-r"])).ok().stdout;
    let inside = run.stdout(&[], &["uname", "-r"]);
    assert_eq!(own.trim() != inside, run.isopod(), "{own} {inside}");
}

/// `--init` puts an init in front of the program, which collects orphans.
pub fn init(run: &Run<'_>) {
    let container = run.start(&["--init"], &["sleep", "1000"]);
    let first = container.shell("cat /proc/1/comm");
    assert!(["docker-init", "podman-init"].contains(&&*first), "{first}");
    let orphan =
        "sh -c 'sleep 0 & exit'; until ! grep -ls '^State:.Z' /proc/[0-9]*/status; do :; done";
    container.shell(orphan);
    container.ok(&["stop", "--time", "5"]);
    assert_eq!(container.inspect(".State.ExitCode"), "143");
    container.remove();
}

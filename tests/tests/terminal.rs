//! Terminals: by a console socket as container engines use it, and the caller's own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;

use isopod_tests::terminal::{ConsoleSocket, Terminal};
use isopod_tests::{Command, Container, PROBE_PATH, Scope, runtime};
use serde_json::json;

fn with_terminal<'a>(scope: &'a Scope, args: &[&str]) -> Container<'a> {
    scope.container().args(args).edit(|c| c["process"]["terminal"] = json!(true))
}

/// Reads the answers of the probe's `window` to resizing.
fn assert_follows_resizing(terminal: &mut Terminal) {
    for (columns, rows) in [(100, 40), (33, 7)] {
        terminal.screen.line_with("size ");
        terminal.resize(columns, rows);
        terminal.screen.line_with(&format!("size {columns}x{rows}"));
        // Gives the next round its first line.
        terminal.resize(columns + 1, rows);
    }
    terminal.keys("\n");
    terminal.screen.line_with("bye");
}

#[test]
fn create_sends_the_terminal_over_the_console_socket() {
    let scope = Scope::in_pod();
    let console = ConsoleSocket::bind(scope.dir());
    let container =
        with_terminal(&scope, &["sh", "-c", "tty; stty size; read x; echo got $x; exit 5"]);
    let created = container.detach("create", &["--console-socket", console.path()]);
    let mut terminal = console.terminal();
    terminal.resize(90, 30);
    container.start().ok();
    assert_eq!(terminal.screen.line_with("/dev/"), "/dev/pts/0");
    assert_eq!(terminal.screen.line().unwrap(), "30 90");
    terminal.keys("word\n");
    terminal.screen.line_with("got word");
    assert_eq!(created.wait().status(), 5);
    container.delete().ok();
}

#[test]
fn the_terminal_begins_with_its_size() {
    let scope = Scope::in_pod();
    let console = ConsoleSocket::bind(scope.dir());
    let container = with_terminal(&scope, &["sh", "-c", "stty size; read x"])
        .edit(|c| c["process"]["consoleSize"] = json!({ "height": 31, "width": 117 }));
    let created = container.detach("create", &["--console-socket", console.path()]);
    let mut terminal = console.terminal();
    container.start().ok();
    terminal.screen.line_with("31 117");
    terminal.keys("\n");
    created.wait();
}

#[test]
fn run_detached_follows_the_terminals_size() {
    let scope = Scope::in_pod();
    let console = ConsoleSocket::bind(scope.dir());
    let container = with_terminal(&scope, &[PROBE_PATH, "window"]);
    let created = container.detach("run", &["--detach", "--console-socket", console.path()]);
    let mut terminal = console.terminal();
    assert_follows_resizing(&mut terminal);
    assert_eq!(created.wait().status(), 0);
    container.delete().ok();
}

#[test]
fn exec_sends_its_terminal_over_the_console_socket() {
    let scope = Scope::in_pod();
    let console = ConsoleSocket::bind(scope.dir());
    let container = scope.container().args(["sleep", "1000"]);
    let _created = container.start_new();
    let pid_file = scope.dir().join("exec.pid");
    let pid_file = pid_file.to_str().unwrap();
    let options = ["--tty", "--detach", "--console-socket", console.path(), "--pid-file", pid_file];
    let mut job = container.command("exec", &options).args([PROBE_PATH, "window"]).spawn();
    assert_eq!(job.wait().status(), 0, "{}", job.output());
    let mut terminal = console.terminal();
    assert_follows_resizing(&mut terminal);
}

/// A terminal is hung up when its holder ends. A process that waits gets SIGHUP, and a process in a
/// write does not wait for ever.
#[test]
fn a_terminal_whose_reader_is_gone_is_hung_up() {
    let scope = Scope::in_pod();
    for (script, status) in [
        ("trap 'exit 7' HUP; echo up; while :; do sleep 0.1; done", 7),
        ("trap '' HUP; echo up; while echo; do :; done; exit 8", 8),
    ] {
        let console = ConsoleSocket::bind(scope.dir());
        let container = with_terminal(&scope, &["sh", "-c", script]);
        let created = container.detach("create", &["--console-socket", console.path()]);
        let mut terminal = console.terminal();
        container.start().ok();
        terminal.screen.line_with("up");
        drop(terminal);
        assert_eq!(created.wait().status(), status);
        container.delete().ok();
    }
}

#[test]
fn run_on_the_callers_terminal_follows_its_size() {
    let scope = Scope::in_pod();
    let container = with_terminal(&scope, &[PROBE_PATH, "window"]);
    let (mut terminal, slave) = Terminal::open(81, 25);
    let mut job = container.command_with_bundle("run", &[]).terminal(slave).spawn();
    terminal.screen.line_with("size 81x25");
    terminal.resize(80, 24);
    assert_follows_resizing(&mut terminal);
    assert_eq!(job.wait().status(), 0);
}

#[test]
fn exec_on_the_callers_terminal_passes_control_keys() {
    let scope = Scope::in_pod();
    let container = scope.container().args(["sleep", "1000"]);
    let _created = container.start_new();
    let (mut terminal, slave) = Terminal::open(80, 24);
    let script = "trap 'echo interrupted; exit 9' INT; tty; while :; do read line; done";
    let command = container.command("exec", &["--tty"]).args(["sh", "-c", script]);
    let mut job = command.terminal(slave).spawn();
    terminal.screen.line_with("/dev/pts/");
    // Control-C is for the program inside, not for the command.
    terminal.keys("\x03");
    terminal.screen.line_with("interrupted");
    assert_eq!(job.wait().status(), 9);
}

#[test]
fn without_a_terminal_there_is_none() {
    let scope = Scope::in_pod();
    let report = scope.container().probe(&["report"]).run_json();
    assert_eq!(report["terminal"], json!(false));
}

#[test]
fn a_detached_terminal_needs_a_console_socket() {
    let scope = Scope::in_pod();
    let container = with_terminal(&scope, &["true"]);
    let out = container.command_with_bundle("create", &[]).output();
    out.one_line_error(&["console"]);
    scope.assert_nothing_left();
}

/// A terminal is made even if the caller's streams are none, as in the pipeline of a script. Its
/// output then has no carriage returns, which are for a terminal.
#[test]
fn the_callers_streams_need_not_be_a_terminal() {
    let scope = Scope::in_pod();
    // runc sets the size at some time after the start.
    let script =
        "read word; tty; echo got $word; while [ \"$(stty size)\" = '0 0' ]; do :; done; stty size";
    let container = with_terminal(&scope, &["sh", "-c", script]);
    let sleeper = scope.container().args(["sleep", "1000"]);
    let _created = sleeper.start_new();
    let place = scope.dir().to_str().unwrap();
    let redirect =
        format!("echo word > {place}/in; \"$@\" < {place}/in > {place}/out 2> {place}/err");
    let redirected = |command: Command<'_>, seen: &str| {
        let (_terminal, slave) = Terminal::open(81, 25);
        let mut job = command.through(&["sh", "-c", &redirect, "sh"]).terminal(slave).spawn();
        let status = job.wait().status();
        let read = |name: &str| fs::read_to_string(scope.dir().join(name)).unwrap();
        assert_eq!((status, &*read("out"), &*read("err")), (0, seen, ""));
    };
    redirected(container.command_with_bundle("run", &[]), "word\n/dev/pts/0\ngot word\n25 81\n");
    let exec = || sleeper.command("exec", &["--tty"]).args(["sh", "-c", script]);
    redirected(exec(), "word\n/dev/pts/0\ngot word\n25 81\n");
    if runtime().is_isopod() {
        // Without even a controlling terminal, where runc gives up.
        let script = ["sh", "-c", "read word; tty | cut -c 1-9; echo got $word"];
        let exec = sleeper.command("exec", &["--tty"]).args(script);
        let out = exec.through(&["setsid", "--wait"]).stdin("word\n").output().ok();
        assert_eq!(out.stdout, "word\n/dev/pts/\ngot word\n");
    }
}

//! More processes in a running container.

use serde_json::json;

use super::process::drag;
use crate::engine::Run;
use crate::terminal::Terminal;

/// `exec` takes user, directory and environment, passes streams and the exit status, and works with
/// a terminal.
pub fn exec(run: &Run<'_>) {
    let container = run.start(&["--env=ONE=1"], &["sleep", "1000"]);
    let options = ["--user=1000:1001", "--workdir=/tmp", "--env=TWO=2"];
    let seen = container.probe(&options, &["report"]);
    assert_eq!((&seen["uid"][0], &seen["gid"][0]), (&json!(1000), &json!(1001)));
    assert_eq!((&seen["cwd"], &seen["env"]["TWO"]), (&json!("/tmp"), &json!("2")));
    assert_eq!(seen["env"]["ONE"], json!("1"));
    assert!(seen["processes"].as_array().is_some_and(|p| p.contains(&json!(1))), "{seen}");

    assert_eq!(container.exec(&[], &["sh", "-c", "exit 9"]).status, 9);
    let missing = container.exec(&[], &["no-such-program"]);
    assert!([126, 127].contains(&missing.status), "{missing}");

    let cat = container.command(&["exec", "-i"], &["sh", "-c", "cat; echo done >&2"]);
    let output = run.end(cat.stdin("some input")).ok();
    assert_eq!((&*output.stdout, &*output.stderr), ("some input", "done\n"));

    let (mut terminal, slave) = Terminal::open(77, 22);
    let window = container.command(&["exec", "-i", "-t"], &["probe", "window"]);
    let mut job = window.terminal(slave).spawn();
    // The first size may be that of the time before the client has sent its own.
    terminal.screen.line_with("size 77x22");
    drag(&mut terminal, 99);
    terminal.keys("\n");
    terminal.screen.line_with("bye");
    assert_eq!(job.wait().status(), 0);
    container.remove();
}

/// `exec --detach` leaves a running process.
pub fn exec_detached(run: &Run<'_>) {
    let container = run.start(&[], &["sleep", "1000"]);
    container.exec(&["--detach"], &["sh", "-c", "mkfifo /f; echo made; cat /f >/out"]).ok();
    container.shell("until [ -p /f ]; do :; done; echo hello >/f; until [ -s /out ]; do :; done");
    assert_eq!(container.shell("cat /out"), "hello");
    container.remove();
}

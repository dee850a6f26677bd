//! A container's life: from `run --detach` to `rm`.

use std::io::Write;

use crate::engine::Run;
use crate::terminal::Terminal;

/// A script that counts its SIGTERMs and survives them; on SIGUSR1 it says so.
const COUNTING: &str = "n=0; trap 'n=$((n+1)); echo term $n' TERM; trap 'echo usr1' USR1; echo up; \
     while :; do sleep 1000 & wait; done";

/// `run --detach`, `logs`, `wait`, `inspect`, `rm`.
pub fn detached(run: &Run<'_>) {
    let container = run.start_shell(&[], "echo one; echo two >&2; sleep 1; exit 5");
    assert_eq!(container.wait(), 5);
    let logs = container.logs();
    assert_eq!((&*logs.stdout, &*logs.stderr), ("one\n", "two\n"));
    assert_eq!(container.inspect(".State.ExitCode"), "5");
    assert_eq!(container.inspect(".State.Status"), "exited");
    container.ok(&["rm"]);
    assert_ne!(run.output(&["inspect", &container.name]).status, 0);
}

/// `create`, then `start --attach`, twice.
pub fn created_and_started(run: &Run<'_>) {
    let container =
        run.make("create", &["--network=bridge"], &["sh", "-c", "echo x >>/count; wc -l </count"]);
    assert_eq!(container.inspect(".State.Running"), "false");
    assert_eq!(container.ok(&["start", "--attach"]), "1");
    assert_eq!(container.ok(&["start", "--attach"]), "2");
    container.remove();
}

/// A lost microVM: the exit status is none of a program's, and `logs` gives the reason.
pub fn lost(run: &Run<'_>) {
    let container = run.start_shell(&[], "echo written; exec sleep 1000");
    container.await_log("written");
    let sandbox = container.inspect(".State.Pid").parse().expect("a pid");
    let vmm = run.engine.scope.child(sandbox, "isopod-vmm").to_string();
    run.end(run.engine.scope.program(&["kill", "-9", &vmm])).ok();
    assert_eq!(container.wait(), 255);
    let logs = container.logs();
    assert_eq!(logs.stdout, "written\n");
    let said =
        logs.stderr.starts_with("isopod: container ") && logs.stderr.contains("the VMM ended");
    assert!(said, "{logs}");
    container.remove();
}

/// `stop` sends SIGTERM once, and kills only a container that does not end.
pub fn stop(run: &Run<'_>) {
    let polite = run.start_shell(
        &[],
        "trap 'echo term; exit 3' TERM; echo up; while :; do sleep 1000 & wait; done",
    );
    polite.await_log("up");
    polite.ok(&["stop", "--time", "60"]);
    assert_eq!(polite.inspect(".State.ExitCode"), "3");
    assert_eq!(polite.logs().stdout, "up\nterm\n");
    polite.remove();

    let deaf = run.start_shell(&[], COUNTING);
    deaf.await_log("up");
    deaf.ok(&["stop", "--time", "2"]);
    assert_eq!(deaf.inspect(".State.ExitCode"), "137");
    assert_eq!(deaf.logs().stdout, "up\nterm 1\n");
    deaf.remove();
}

/// `kill` sends the given signal, by default SIGKILL.
pub fn kill(run: &Run<'_>) {
    let container = run.start_shell(&[], COUNTING);
    container.await_log("up");
    container.ok(&["kill", "--signal", "USR1"]);
    container.await_log("usr1");
    assert_eq!(container.inspect(".State.Running"), "true");
    container.ok(&["kill"]);
    assert_eq!(container.wait(), 137);
    container.remove();
}

/// `restart` keeps the container's files; `rm --force` removes a running container.
pub fn restart(run: &Run<'_>) {
    let script = "echo up >>/count; echo up; exec sleep 1000";
    let container = run.start_shell(&["--network=bridge"], script);
    container.await_log("up");
    container.ok(&["restart", "--time", "1"]);
    container.shell("until [ $(wc -l </count) = 2 ]; do sleep 0.1; done");
    container.ok(&["stop", "--time", "1"]);
    container.ok(&["start"]);
    container.shell("until [ $(wc -l </count) = 3 ]; do sleep 0.1; done");
    container.remove();
}

/// The engine starts a failed container again, as often as it is told.
pub fn restart_policy(run: &Run<'_>) {
    let container = run.start_shell(&["--restart=on-failure:2"], "echo up; exit 1");
    // `wait` may return at the first end already, where the engine reports each end.
    while container.inspect(".RestartCount") != "2" || container.inspect(".State.Running") == "true"
    {
        container.wait();
    }
    assert_eq!(container.logs().stdout, "up\nup\nup\n");
    container.remove();
}

/// `attach` reaches the streams of a running process.
pub fn attach(run: &Run<'_>) {
    // The container's input does not end with that of the attached client.
    let script = "while read -r line && [ $line != end ]; do echo got $line; done; exit 4";
    let container = run.start_shell(&["-i"], script);
    let mut job = container.command(&["attach"], &[]).stdin_piped().spawn();
    let mut input = job.take_stdin();
    input.write_all(b"first\n").expect("attach reads");
    assert_eq!(job.stdout.line().as_deref(), Some("got first"));
    input.write_all(b"end\n").expect("attach reads");
    let status = job.wait().status();
    assert_eq!(container.wait(), 4);
    // Podman 4 reports only the end of the streams.
    assert!(run.podman() || status == 4, "{status}");
    container.remove();

    let container = run.start(&["-i", "-t"], &["probe", "window"]);
    let (mut terminal, slave) = Terminal::open(66, 21);
    let mut job = container.command(&["attach"], &[]).terminal(slave).spawn();
    terminal.screen.line_with("size 66x21");
    terminal.keys("\n");
    assert_eq!(job.wait().status(), 0);
    container.remove();
}

/// `pause` stops all processes; `unpause` lets them go on from there.
pub fn pause(run: &Run<'_>) {
    let container = run.named();
    let script = "while read -r line; do echo got $line; done; exit 4";
    let options = ["-i", "--name", &container.name];
    let mut job = run.command("run", &options, &["sh", "-c", script]).stdin_piped().spawn();
    let mut input = job.take_stdin();
    input.write_all(b"one\n").expect("the client reads");
    assert_eq!(job.stdout.line().as_deref(), Some("got one"));
    container.ok(&["pause"]);
    assert_eq!(container.inspect(".State.Status"), "paused");
    input.write_all(b"two\n").expect("the client reads");
    // This call gives the engine time to bring an answer.
    run.ok(&["ps"]);
    assert_eq!(job.stdout.so_far(), "");
    container.ok(&["unpause"]);
    assert_eq!(job.stdout.line().as_deref(), Some("got two"));
    drop(input);
    assert_eq!(job.wait().status(), 4);
    container.remove();
}

//! Signals: `kill`, and those that `run` passes on.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use isopod_tests::Scope;

#[test]
fn kill_sends_the_signal_it_is_told() {
    let scope = Scope::new();
    let script = "trap 'echo hup' HUP; trap 'echo usr1' USR1; trap 'echo term; exit 0' TERM; \
                  echo ready; while :; do sleep 1000 & wait $!; kill $!; done";
    let container = scope.container().shell(script);
    let mut created = container.start_new();
    for (signal, heard) in [("SIGHUP", "ready"), ("USR1", "hup"), ("15", "usr1")] {
        assert_eq!(created.stdout.line().unwrap(), heard);
        container.kill(signal).ok();
    }
    assert_eq!(created.stdout.line().unwrap(), "term");
    assert_eq!(created.wait().status(), 0);
}

#[test]
fn kill_sends_term_unless_told() {
    let scope = Scope::new();
    let container = scope.container().shell("trap 'exit 6' TERM; echo up; sleep 1000 & wait");
    let mut created = container.start_new();
    created.stdout.line_with("up");
    container.command("kill", &[]).output().ok();
    assert_eq!(created.wait().status(), 6);
}

#[test]
fn kill_all_reaches_every_process() {
    let scope = Scope::new();
    // The first process lives on, because its end would kill all others.
    let loop_with = |trap: &str| format!("trap '{trap}' TERM; echo up; while :; do sleep 1; done");
    let container = scope.container().shell(&loop_with("echo heard"));
    let mut created = container.start_new();
    created.stdout.line_with("up");
    let command = container.command("exec", &[]).args(["sh", "-c", &loop_with("exit 9")]);
    let mut other = command.spawn();
    other.stdout.line_with("up");
    container.command("kill", &["--all"]).args(["TERM"]).output().ok();
    assert_eq!(other.wait().status(), 9);
    created.stdout.line_with("heard");
    container.command("kill", &["--all"]).args(["KILL"]).output().ok();
    assert_eq!(created.wait().status(), 128 + 9);
}

#[test]
fn run_passes_signals_on() {
    let scope = Scope::new();
    // The last one is a real-time signal, as systemd sends to its containers.
    for signal in [15, 14, 37] {
        let script = format!("trap 'exit 13' {signal}; echo up; sleep 1000 & wait");
        let container = scope.container().shell(&script);
        let mut run = container.command_with_bundle("run", &[]).spawn();
        run.stdout.line_with("up");
        let signal_option = format!("-{signal}");
        scope.program(&["kill", &signal_option, &run.pid.to_string()]).output().ok();
        assert_eq!(run.wait().status(), 13, "signal {signal}");
        scope.assert_nothing_left();
    }
}

#[test]
fn a_created_container_can_be_killed() {
    let scope = Scope::new();
    let container = scope.container().args(["sleep", "1000"]);
    let created = container.create();
    container.kill("KILL").ok();
    assert_eq!(created.wait().status(), 128 + 9);
    assert_eq!(container.status(), "stopped");
    container.delete().ok();
}

/// A caller of runc reads the pipe when it likes, and a killed container is dead before.
#[test]
fn a_killed_container_ends_although_nobody_reads_its_output() {
    let scope = Scope::alone();
    let container = scope.container().args(["yes"]);
    let mut run = container.command_with_bundle("run", &[]).spawn();
    run.stdout.line_with("y");
    container.kill("KILL").ok();
    assert_eq!(run.wait().status(), 128 + 9, "{}", run.stderr.so_far());
    scope.assert_nothing_left();
}

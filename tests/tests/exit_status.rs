//! The output and exit status of `isopod run` and `isopod exec`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;
use std::os::unix::fs::PermissionsExt;

use isopod_tests::{Scope, microvm_only};

/// A time in seconds, longer than any wait of the harness.
const LONGER_THAN_ANY_WAIT: &str = "3600";

#[test]
fn output_and_status_are_the_programs_own() {
    let scope = Scope::in_pod();
    for status in [0, 7, 255] {
        let script = format!("echo to stdout; echo to stderr >&2; exit {status}");
        let out = scope.container().shell(&script).run();
        assert_eq!(out.status, status, "{out}");
        assert_eq!((&*out.stdout, &*out.stderr), ("to stdout\n", "to stderr\n"), "{out}");
    }
}

#[test]
fn a_signal_ends_with_128_and_its_number() {
    let scope = Scope::in_pod();
    // The first process of a PID namespace gets no signal from inside that it does not handle.
    let container = scope.container().args(["sleep", "1000"]);
    let created = container.start_new();
    container.kill("KILL").ok();
    assert_eq!(created.wait().status(), 128 + 9);
    let container = scope.container().args(["sleep", "1000"]);
    let _created = container.start_new();
    for (signal, number) in [("TERM", 15), ("KILL", 9), ("SEGV", 11)] {
        let out = container.exec(["sh", "-c", &format!("kill -{signal} $$")]);
        assert_eq!(out.status, 128 + number, "{out}");
    }
}

#[test]
fn a_clean_up_that_fails_leaves_the_status_as_it_is() {
    microvm_only!();
    let scope = Scope::in_pod();
    let container = scope.container().shell("echo up; read line; exit 9");
    let mut run = container.command_with_bundle("run", &[]).stdin_piped().spawn();
    run.stdout.line_with("up");
    // A directory with entries in the state directory is never removed with it.
    let kept = scope.root().join(&container.id).join("kept");
    fs::create_dir_all(kept.join("by-somebody")).unwrap();
    drop(run.take_stdin());
    assert_eq!(run.wait().status(), 9);
    let said = run.stderr.rest();
    assert!(said.contains("warning") && said.contains("something of it is left"), "{said}");
    fs::remove_dir_all(kept).unwrap();
    container.delete().ok();
    scope.assert_nothing_left();
}

#[test]
fn run_of_a_missing_program_names_it() {
    let scope = Scope::in_pod();
    for program in ["no-such-program", "/no/such/program"] {
        let out = scope.container().args([program]).run();
        out.one_line_error(&[program]);
        assert_eq!(out.status, 1, "{out}");
        assert_eq!(out.stdout, "", "{out}");
    }
}

#[test]
fn run_of_what_is_not_executable_says_so() {
    let scope = Scope::in_pod();
    let container = scope.container().args(["/etc/passwd"]);
    let mode = fs::Permissions::from_mode(0o644);
    fs::set_permissions(container.bundle.rootfs("/etc/passwd"), mode).unwrap();
    for program in ["/etc/passwd", "/etc"] {
        let out = scope.container().args([program]).run();
        out.one_line_error(&[program]);
        assert_eq!(out.status, 1, "{out}");
    }
}

#[test]
fn exec_of_a_missing_or_unfit_program_leaves_the_container_alone() {
    let scope = Scope::in_pod();
    let container = scope.container().args(["sleep", "1000"]);
    let _created = container.start_new();
    for program in ["no-such-program", "/no/such", "/etc/passwd"] {
        let out = container.exec([program]);
        assert!(out.stderr.contains(program), "{out}");
        assert_eq!(out.status, 255, "{out}");
    }
    assert_eq!(container.status(), "running");
    container.exec(["true"]).ok();
}

/// The error comes at creation: before any start, and while the input is still open. It is no
/// timeout, because the times set here are longer than the test waits.
#[test]
fn a_missing_program_is_noticed_when_the_container_is_created() {
    microvm_only!();
    let scope = Scope::in_pod();
    for (verb, options) in [("create", &[][..]), ("run", &["--timeline"])] {
        let container = scope.container().args(["no-such-program"]);
        let command = container.command_with_bundle(verb, options);
        let command = command.env("ISOPOD_BOOT_TIMEOUT", LONGER_THAN_ANY_WAIT);
        let mut job = command.stdin_piped().spawn();
        let stdin = job.take_stdin();
        let end = job.wait();
        drop(stdin);
        let out = job.output();
        // One line: after a creation, the steps up to the container's end would follow.
        out.one_line_error(&["no-such-program"]);
        assert_eq!(end.status(), 1, "{out}");
        scope.assert_nothing_left();
    }
}

#[test]
fn a_missing_program_of_exec_does_not_wait_for_input() {
    let scope = Scope::in_pod();
    let container = scope.container().args(["sleep", "1000"]);
    let _created = container.start_new();
    let mut job = container.command("exec", &[]).args(["no-such-program"]).stdin_piped().spawn();
    let stdin = job.take_stdin();
    assert_ne!(job.wait().status(), 0);
    drop(stdin);
    let out = job.output();
    assert!(out.stderr.contains("no-such-program"), "{out}");
    container.exec(["true"]).ok();
}

#[test]
fn arguments_and_output_go_through_as_bytes() {
    let scope = Scope::in_pod();
    let odd = "spaces  \t\n and \"quotes\" $HOME \\ ünï";
    let out = scope.container().args(["printf", "%s|", odd, "", "last"]).run().ok();
    assert_eq!(out.stdout, format!("{odd}||last|"), "{out}");
}

//! What `isopod run` and `isopod exec` print and return.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use isopod_tests::{Scope, microvm_only, runtime};

#[test]
fn output_and_status_are_the_programs_own() {
    let scope = Scope::new();
    for status in [0, 7, 255] {
        let script = format!("echo to stdout; echo to stderr >&2; exit {status}");
        let out = scope.container().shell(&script).run();
        assert_eq!(out.status, status, "{out}");
        assert_eq!((&*out.stdout, &*out.stderr), ("to stdout\n", "to stderr\n"), "{out}");
    }
}

#[test]
fn a_signal_ends_with_128_and_its_number() {
    let scope = Scope::new();
    // The first process of a pid namespace takes no signal from inside that it does not handle.
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
fn run_of_a_missing_program_names_it() {
    let scope = Scope::new();
    for program in ["no-such-program", "/no/such/program"] {
        let out = scope.container().args([program]).run();
        out.one_line_error(&[program]);
        if runtime().is_isopod() {
            assert_eq!(out.status, 127, "{out}");
        }
        assert_eq!(out.stdout, "", "{out}");
    }
}

#[test]
fn run_of_what_is_not_executable_says_so() {
    let scope = Scope::new();
    let container = scope.container().args(["/etc/passwd"]);
    let mode = fs::Permissions::from_mode(0o644);
    fs::set_permissions(container.bundle.rootfs("/etc/passwd"), mode).unwrap();
    for program in ["/etc/passwd", "/etc"] {
        let out = scope.container().args([program]).run();
        out.one_line_error(&[program]);
        if runtime().is_isopod() {
            assert_eq!(out.status, 126, "{out}");
        }
    }
}

#[test]
fn exec_of_a_missing_or_unfit_program_leaves_the_container_alone() {
    let scope = Scope::new();
    let container = scope.container().args(["sleep", "1000"]);
    let _created = container.start_new();
    for (program, status) in [("no-such-program", 127), ("/no/such", 127), ("/etc/passwd", 126)] {
        let out = container.exec([program]);
        assert!(out.stderr.contains(program), "{out}");
        assert_ne!(out.status, 0, "{out}");
        if runtime().is_isopod() {
            assert_eq!(out.status, status, "{out}");
        }
    }
    assert_eq!(container.status(), "running");
    container.exec(["true"]).ok();
}

/// The error comes at once: it waits neither for the end of the input nor for any timeout. How long
/// "at once" is on this machine, a program that does exist shows.
#[test]
fn a_missing_program_is_noticed_as_fast_as_another_one_runs() {
    microvm_only!();
    let scope = Scope::new();
    let run = |program: &str, status: i32| {
        let container = scope.container().args([program]);
        let start = Instant::now();
        let mut job = container.command_with_bundle("run", &[]).stdin_piped().spawn();
        let stdin = job.take_stdin();
        let end = job.wait();
        let took = start.elapsed();
        drop(stdin);
        assert_eq!(end.status(), status, "{}", job.output());
        took
    };
    let good = run("true", 0);
    let missing = run("no-such-program", 127);
    assert!(missing < good * 2 + Duration::from_secs(1), "took {missing:?}, `true` {good:?}");
}

#[test]
fn arguments_and_output_go_through_as_bytes() {
    let scope = Scope::new();
    let odd = "spaces  \t\n and \"quotes\" $HOME \\ ünï";
    let out = scope.container().args(["printf", "%s|", odd, "", "last"]).run().ok();
    assert_eq!(out.stdout, format!("{odd}||last|"), "{out}");
}

//! Streams: everything arrives, in order, both ways at once, up to the last byte.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::io::{Read, Write, copy};

use isopod_tests::pattern::{Pattern, compare};
use isopod_tests::{Command, DEADLINE, PROBE_PATH, Scope, microvm_only, runtime};

const LEN: u64 = 64 << 20;

/// Sends pattern 2 to the probe's `duplex`, which sends pattern 1 meanwhile.
fn both_ways(command: Command<'_>) {
    let mut job = command.stdin_piped().spawn();
    let mut stdin = job.take_stdin();
    let feeder = std::thread::spawn(move || copy(&mut Pattern::new(2, LEN), &mut stdin));
    compare(Pattern::new(1, LEN), &mut job.stdout).unwrap();
    assert_eq!(feeder.join().unwrap().unwrap(), LEN);
    let out = job.output().ok();
    assert_eq!(out.stderr, format!("wrote {LEN}, read {LEN} as sent\n"));
}

#[test]
fn run_carries_64_mib_each_way_at_once() {
    let scope = Scope::in_pod();
    let container = scope.container().probe(&["duplex", &LEN.to_string()]);
    both_ways(container.command_with_bundle("run", &[]));
}

#[test]
fn exec_carries_64_mib_each_way_at_once() {
    let scope = Scope::in_pod();
    let container = scope.container().args(["sleep", "1000"]);
    let _created = container.start_new();
    both_ways(container.command("exec", &[]).args([PROBE_PATH, "duplex", &LEN.to_string()]));
}

#[test]
fn the_last_line_before_exit_is_never_lost() {
    let scope = Scope::in_pod();
    let container = scope.container().args(["sleep", "1000"]);
    let _created = container.start_new();
    for run in 0..100 {
        let script = format!("echo first; echo error >&2; echo last of {run}; exit 3");
        let out = container.exec(["sh", "-c", &script]);
        assert_eq!(out.status, 3, "run {run}: {out}");
        assert_eq!(out.stdout, format!("first\nlast of {run}\n"), "run {run}: {out}");
        assert_eq!(out.stderr, "error\n", "run {run}: {out}");
    }
}

#[test]
fn a_mebibyte_written_just_before_exit_arrives() {
    let scope = Scope::in_pod();
    let container = scope.container().shell("head -c 1048576 /dev/zero; echo end >&2");
    let out = container.run().ok();
    assert_eq!((out.stdout.len(), &*out.stderr), (1 << 20, "end\n"));
}

#[test]
fn the_end_of_input_arrives_and_output_still_comes_back() {
    let scope = Scope::in_pod();
    let container = scope.container().args(["sort"]);
    let out = container.command_with_bundle("run", &[]).stdin("b\nc\na").output().ok();
    assert_eq!(out.stdout, "a\nb\nc\n");
}

#[test]
fn a_program_need_not_read_its_input() {
    let scope = Scope::in_pod();
    let container = scope.container().args(["echo", "done"]);
    let mut job = container.command_with_bundle("run", &[]).stdin_piped().spawn();
    let mut stdin = job.take_stdin();
    // Held open, and full: neither may keep the command from ending.
    let _ = stdin.write(&[b'x'; 4096]);
    assert_eq!(job.wait().status(), 0);
    drop(stdin);
    assert_eq!(job.output().stdout, "done\n");
}

#[test]
fn input_and_output_take_turns() {
    let scope = Scope::in_pod();
    let container = scope.container().shell("while read line; do echo got $line; done; echo end");
    let mut job = container.command_with_bundle("run", &[]).stdin_piped().spawn();
    let mut stdin = job.take_stdin();
    for number in 0..20 {
        writeln!(stdin, "{number}").unwrap();
        assert_eq!(job.stdout.line().unwrap(), format!("got {number}"));
    }
    drop(stdin);
    assert_eq!(job.output().stdout, "end\n");
}

#[test]
fn the_end_of_output_arrives_while_the_program_runs_on() {
    let scope = Scope::in_pod();
    let container = scope.container().shell("echo bye; exec >&-; read line; exit 5");
    let mut job = container.command_with_bundle("run", &[]).stdin_piped().spawn();
    let mut stdin = job.take_stdin();
    assert_eq!(job.stdout.line().as_deref(), Some("bye"));
    assert_eq!(job.stdout.line(), None);
    assert_eq!(job.ended(), None);
    writeln!(stdin, "go on").unwrap();
    assert_eq!(job.wait().status(), 5);
}

/// A foreground `exec` waits for all holders of its output. The pid of a detached one ends with the
/// process, and later output arrives all the same.
#[test]
fn what_a_descendant_writes_after_the_end_arrives() {
    let scope = Scope::in_pod();
    let container = scope.container().args(["sleep", "1000"]);
    let _created = container.start_new();
    let script = "(while ! test -e /tmp/go; do sleep 0.1; done; echo late) & echo first; exit 3";
    let pid_file = container.bundle.dir.join("exec.pid");
    let detached = ["--detach", "--pid-file", pid_file.to_str().unwrap()];
    for options in [&[][..], &detached] {
        let mut job = container.command("exec", options).args(["sh", "-c", script]).spawn();
        assert_eq!(job.stdout.line().as_deref(), Some("first"));
        if options.is_empty() {
            assert_eq!(job.ended(), None);
        } else {
            assert_eq!(job.wait().status(), 0);
            let pid = std::fs::read_to_string(&pid_file).unwrap().parse().unwrap();
            assert_eq!(scope.keeper().wait(pid, DEADLINE).unwrap().status(), 3);
        }
        container.exec(["touch", "/tmp/go"]).ok();
        assert_eq!(job.stdout.rest(), "late\n");
        assert_eq!(job.wait().status(), if options.is_empty() { 3 } else { 0 });
        container.exec(["rm", "/tmp/go"]).ok();
    }
}

#[test]
fn a_reader_that_goes_away_does_not_hang_the_program() {
    let scope = Scope::in_pod();
    let container = scope.container().args(["sleep", "1000"]);
    let _created = container.start_new();
    let mut job = container.command("exec", &[]).args(["yes"]).spawn();
    assert_eq!(job.stdout.line().unwrap(), "y");
    job.close_stdout();
    assert_ne!(job.wait().status(), 0);
    assert!(!container.exec(["ps"]).ok().stdout.contains("yes"), "`yes` still runs");
}

#[test]
fn streams_of_several_processes_do_not_mix() {
    let scope = Scope::in_pod();
    let container = scope.container().args(["sleep", "1000"]);
    let _created = container.start_new();
    let script =
        |mark: &str| format!("i=0; while [ $i -lt 2000 ]; do echo {mark}; i=$((i+1)); done");
    let run = |mark| container.command("exec", &[]).args(["sh", "-c", &script(mark)]).spawn();
    let mut jobs = [("a", run("a")), ("b", run("b")), ("c", run("c"))];
    for (mark, job) in &mut jobs {
        let mut text = String::new();
        job.stdout.read_to_string(&mut text).unwrap();
        assert_eq!(text, format!("{mark}\n").repeat(2000));
        assert_eq!(job.wait().status(), 0);
    }
}

/// Others may share the command's input, such as the loop around it. The input is theirs until the
/// command's program reads. runc takes all of it at once.
#[test]
fn input_is_left_alone_until_the_program_reads() {
    microvm_only!();
    let scope = Scope::in_pod();
    let container = scope.container().args(["sleep", "1000"]);
    let _created = container.start_new();
    let runtime = format!("{} --root {}", runtime().path.display(), scope.root().display());
    let lines = scope.dir().join("lines");
    std::fs::write(&lines, "a\nb\nc\n").unwrap();
    let run = |script: &str| {
        let script = script.replace("EXEC", &format!("{runtime} exec {}", container.id));
        let script = script.replace("LINES", lines.to_str().unwrap());
        scope.program(&["sh", "-c", &script]).output().ok().stdout
    };
    let looped = "while read line; do echo $line; EXEC sh -c 'echo in; sleep 0.1'; done";
    assert_eq!(run(&format!("{looped} < LINES")), "a\nin\nb\nin\nc\nin\n");
    assert_eq!(run(&format!("cat LINES | {looped}")), "a\nin\nb\nin\nc\nin\n");
    // Any process may be the reader, by any descriptor or call.
    for reader in ["cat", "sh -c 'sleep 0.1; cat'", "sh -c 'exec 5<&0 0</dev/null; cat <&5; true'"]
    {
        assert_eq!(run(&format!("read line < LINES; EXEC {reader} < LINES")), "a\nb\nc\n");
    }
    assert_eq!(run("echo x | EXEC sh -c 'read -t 100 y; echo got $y'"), "got x\n");
}

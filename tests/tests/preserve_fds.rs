//! `--preserve-fds`: streams through descriptors beyond the standard ones.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs;

use isopod_tests::terminal::Terminal;
use isopod_tests::{Command, Container, DEADLINE, Scope, microvm_only};
use serde_json::json;

/// Runs a command with a pipe to read as descriptor 3, and this script's output as descriptor 4.
const PIPES: &str = r#"printf 'to the guest' | "$@" 3<&0 </dev/null 4>&1 1>&2 | cat"#;

/// Runs a command with a socket as descriptor 3. The other end sends a question and reads the whole
/// answer.
const SOCKET: &str = r#"
    use Socket; use POSIX;
    socketpair(my $here, my $there, AF_UNIX, SOCK_STREAM, 0) or die;
    my $child = fork;
    if (!$child) { POSIX::dup2(fileno $there, 3); exec @ARGV; die }
    close $there;
    syswrite $here, "question\nmore";
    shutdown $here, 1;
    print while <$here>;
    waitpid $child, 0;
    exit $? >> 8"#;

fn through_pipes<'a>(command: Command<'a>, script: &str) -> Command<'a> {
    command.through(&["bash", "-o", "pipefail", "-c", script, "bash"])
}

fn sleeper(scope: &Scope) -> Container<'_> {
    scope.container().args(["sleep", "1000"])
}

#[test]
fn pipes_are_the_processs_own_descriptors() {
    let scope = Scope::alone();
    let container = scope.container().shell("cat <&3 >&4; readlink /proc/self/fd/3; echo done");
    let command = container.command_with_bundle("run", &["--preserve-fds", "2"]);
    let out = through_pipes(command, PIPES).output().ok();
    assert_eq!(out.stdout, "to the guest", "{out}");
    assert!(out.stderr.contains("pipe:[") && out.stderr.contains("done"), "{out}");
    // No other descriptors are open, and without the option none.
    let script =
        "for n in 3 4 5 6; do (eval \"exec 9<&$n\") 2>/dev/null && echo $n; done; echo end";
    for (options, open) in [(&["--preserve-fds", "1"][..], "3\nend\n"), (&[], "end\n")] {
        let container = scope.container().shell(script);
        let command = container.command_with_bundle("run", options);
        let out = through_pipes(command, PIPES).output().ok();
        assert_eq!(out.stderr, open, "{out}");
    }
    scope.assert_nothing_left();
}

#[test]
fn a_large_stream_loses_nothing() {
    let scope = Scope::in_pod();
    let container = scope.container().shell("cat <&3 >&4");
    let command = container.command_with_bundle("run", &["--preserve-fds", "2"]);
    let script = r#"seq 1 300000 | "$@" 3<&0 </dev/null 4>&1 1>&2 | cksum; seq 1 300000 | cksum"#;
    let out = through_pipes(command, script).output().ok();
    let sums: Vec<&str> = out.stdout.lines().collect();
    assert!(sums.len() == 2 && sums[0] == sums[1], "{out}");
}

#[test]
fn a_socket_goes_both_ways_and_ends_both_ways() {
    let scope = Scope::in_pod();
    let script = "read line <&3; echo \"answer to $line\" >&3; cat <&3 >&3";
    let container = scope.container().shell(script);
    let command = container.command_with_bundle("run", &["--preserve-fds", "1"]);
    let out = command.through(&["perl", "-e", SOCKET]).output().ok();
    assert_eq!(out.stdout, "answer to question\nmore");
}

#[test]
fn who_reads_hears_of_the_end_while_the_container_runs() {
    let scope = Scope::alone();
    let container = scope.container().shell("echo only >&4; exec 4>&-; exec sleep 1000");
    let command = container.command_with_bundle("run", &["--detach", "--preserve-fds", "2"]);
    let script = r#""$@" 3</dev/null 4>&1 </dev/null >/dev/null 2>&1 | cat"#;
    let out = through_pipes(command, script).output().ok();
    assert_eq!((&*out.stdout, &*container.status()), ("only\n", "running"));
    container.delete_force().ok();
    scope.assert_nothing_left();
}

#[test]
fn exec_has_them_too_and_a_terminal_beside_them() {
    let scope = Scope::in_pod();
    let container = sleeper(&scope);
    let _created = container.start_new();
    let exec = |options: &[&str], script: &str| {
        container.command("exec", options).args(["sh", "-c", script])
    };
    let command = exec(&["--preserve-fds", "2"], "cat <&3 >&4");
    assert_eq!(through_pipes(command, PIPES).output().ok().stdout, "to the guest");
    let command = exec(&["--detach", "--preserve-fds", "2"], "cat <&3 >&4");
    let script = r#"printf detached | "$@" 3<&0 </dev/null 4>&1 >/dev/null | cat"#;
    assert_eq!(through_pipes(command, script).output().ok().stdout, "detached");

    let (mut terminal, slave) = Terminal::open(80, 24);
    let fifo = scope.dir().join("fifo").to_string_lossy().into_owned();
    let script = format!(
        "mkfifo {fifo}; cat {fifo} > {fifo}.out & \"$@\" 3> {fifo}; status=$?; wait; exit $status"
    );
    let command = exec(&["--tty", "--preserve-fds", "1"], "echo beside >&3; echo shown; exit 5");
    let job = command.through(&["sh", "-c", &script, "sh"]).terminal(slave).spawn();
    terminal.screen.line_with("shown");
    assert_eq!(scope.keeper().wait(job.pid, DEADLINE).unwrap().status(), 5);
    assert_eq!(fs::read_to_string(format!("{fifo}.out")).unwrap(), "beside\n");
}

#[test]
fn a_service_managers_descriptors_come_first() {
    let scope = Scope::in_pod();
    let script = "echo $LISTEN_FDS $LISTEN_PID; cat <&3; cat <&4";
    let manager = r#"
        exec 3< <(echo first) 4< <(echo second)
        LISTEN_FDS=1 LISTEN_PID=$$ exec "$@""#;
    let run = |manager: &str| {
        let container = scope.container().shell(script);
        let command = container.command_with_bundle("run", &["--preserve-fds", "1"]);
        through_pipes(command, manager).output()
    };
    assert_eq!(run(manager).ok().stdout, "1 1\nfirst\nsecond\n");
    // Descriptors meant for another process.
    let out = run(&manager.replace("$$", "1"));
    assert!(out.stdout.starts_with("\nfirst\n"), "{out}");
}

#[test]
fn what_cannot_be_relayed_is_refused_by_name() {
    microvm_only!();
    let scope = Scope::alone();
    let socket = |make: &str| {
        format!(
            "use Socket; use POSIX; socket(my $s, AF_INET, {make}; POSIX::dup2(fileno $s, 3) if \
             fileno $s != 3; $^F = 10; fcntl $s, 2, 0; exec @ARGV"
        )
    };
    let perl = |make: &str| vec!["perl".to_owned(), "-e".to_owned(), socket(make)];
    let shell = |redirect: &str| {
        ["sh", "-c", &format!("exec \"$@\" {redirect}"), "sh"].map(str::to_owned).to_vec()
    };
    let bound = "SOCK_STREAM, 0); bind($s, sockaddr_in(0, INADDR_LOOPBACK)); listen $s, 1";
    for (wrapper, what) in [
        (shell("3</etc/passwd"), "a regular file"),
        (shell("3</"), "a directory"),
        (shell("3</dev/zero"), "a device"),
        (shell("3<&-"), "not open"),
        (perl(bound), "a listening socket"),
        (perl("SOCK_STREAM, 0)"), "without a connection"),
        (perl("SOCK_DGRAM, 0)"), "for datagrams"),
    ] {
        let wrapper: Vec<&str> = wrapper.iter().map(String::as_str).collect();
        let container = scope.container();
        let command = container.command_with_bundle("run", &["--preserve-fds", "1"]);
        command.through(&wrapper).output().one_line_error(&["descriptor 3", what]);
        scope.assert_nothing_left();
    }
    let container = scope.container().edit(|c| c["process"]["args"] = json!(["true"]));
    let command = container.command_with_bundle("run", &["--preserve-fds", "65"]);
    command.output().one_line_error(&["65", "64"]);
}

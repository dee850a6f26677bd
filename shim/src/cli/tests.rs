use crate::cli::*;

fn parse(arguments: &[&str]) -> Cli {
    Cli::try_parse_from([&["isopod"], arguments].concat()).unwrap()
}

#[test]
fn the_command_line_is_consistent() {
    <Cli as clap::CommandFactory>::command().debug_assert();
}

#[test]
fn every_verb_has_a_page_and_is_completed() {
    let command = <Cli as clap::CommandFactory>::command();
    let dir = tempfile::tempdir().unwrap();
    clap_mangen::generate_to(command.clone(), dir.path()).unwrap();
    let mut script = Vec::new();
    clap_complete::generate(
        clap_complete::Shell::Bash,
        &mut command.clone(),
        "isopod",
        &mut script,
    );
    let script = String::from_utf8(script).unwrap();
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        let name = verb.get_name();
        let page = std::fs::read_to_string(dir.path().join(format!("isopod-{name}.1"))).unwrap();
        assert!(page.contains(&format!("isopod {name}")) || page.contains(name), "{page}");
        assert!(page.contains("GLOBAL OPTIONS"), "{page}");
        assert!(script.contains(&format!("isopod,{name})")), "{name}");
    }
    let page = std::fs::read_to_string(dir.path().join("isopod-run.1")).unwrap();
    assert!(page.contains(r"BUNDLE [\-\- COMMAND...]"), "{page}");
    assert!(!dir.path().join("isopod-sandbox.1").exists());
}

#[test]
fn what_runcs_callers_write_is_understood() {
    for arguments in [
        // conmon
        &["--systemd-cgroup", "--root=/run/r", "create", "--bundle", "/b", "--pid-file", "/p", "c"]
            [..],
        &[
            "--root",
            "/r",
            "--log",
            "/l",
            "--log-format",
            "json",
            "exec",
            "--pid-file",
            "/p",
            "--process",
            "/j",
            "--detach",
            "--console-socket",
            "/s",
            "c",
        ],
        // go-runc, for containerd
        &[
            "--root",
            "/r",
            "--log",
            "/l",
            "--log-format",
            "json",
            "create",
            "--bundle",
            "/b",
            "--pid-file",
            "/p",
            "--no-pivot",
            "--no-new-keyring",
            "--console-socket",
            "/s",
            "c",
        ],
        &["--root", "/r", "start", "c"],
        &["--root", "/r", "kill", "--all", "c", "9"],
        &["--root", "/r", "delete", "--force", "c"],
        &["--root", "/r", "state", "c"],
        &["--root", "/r", "ps", "--format", "json", "c"],
        &["ps", "--format", "table", "c", "-ef"],
        &["--root", "/r", "pause", "c"],
        &["--root", "/r", "resume", "c"],
        &["--root", "/r", "update", "--resources", "-", "c"],
        &["update", "--resources=/f", "c"],
        &["update", "--memory", "-1", "--cpu-quota", "-1", "--pids-limit", "-1", "c"],
        &["events", "--stats", "c"],
        &["events", "--interval=5s", "c"],
        &["features"],
        &["spec", "--bundle", "/b"],
        &["--rootless", "auto", "spec", "--rootless"],
        &["exec", "--cgroup", "/a", "c", "true"],
        &[
            "checkpoint",
            "--image-path",
            "/i",
            "--leave-running",
            "--manage-cgroups-mode",
            "soft",
            "c",
        ],
        &["restore", "--image-path", "/i", "--detach", "--bundle", "/b", "c"],
        &["--rootless", "auto", "--criu=/usr/sbin/criu", "list", "--format=json"],
        &["exec", "--ignore-paused", "c", "true"],
        &["list", "-q"],
        &["run", "-d", "--preserve-fds", "0", "-b", "/b", "c"],
        &["check"],
        &["--version"],
        &["-v"],
    ] {
        let result = Cli::try_parse_from([&["isopod"], arguments].concat());
        assert!(result.is_ok(), "{arguments:?}: {}", result.unwrap_err());
    }
}

#[test]
fn options_come_before_or_after_the_id() {
    let before = parse(&["--root", "/r", "create", "--bundle", "/b", "--pid-file", "/p", "c"]);
    let after = parse(&["create", "c", "--pid-file", "/p", "-b", "/b", "--root", "/r"]);
    let shown = |mut cli: Cli| {
        cli.global.began_us = 0;
        format!("{cli:?}")
    };
    assert_eq!(shown(before), shown(after));
    let before = parse(&["kill", "-a", "c", "KILL"]);
    let after = parse(&["kill", "c", "KILL", "--all"]);
    assert_eq!(shown(before), shown(after));
    let before = parse(&["delete", "-f", "c"]);
    let after = parse(&["delete", "c", "--force"]);
    assert_eq!(shown(before), shown(after));
}

#[test]
fn options_behind_the_program_are_the_programs() {
    for arguments in [
        &["exec", "-t", "-e", "A=b", "c", "sh", "-c", "exit 3", "--tty", "--root"][..],
        &["exec", "c", "-t", "--env", "A=b", "sh", "-c", "exit 3", "--tty", "--root"],
        &["exec", "c", "-t", "-eA=b", "--", "sh", "-c", "exit 3", "--tty", "--root"],
    ] {
        let text = format!("{:?}", parse(arguments));
        assert!(text.contains(r#"id: "c""#), "{text}");
        assert!(text.contains(r#"["sh", "-c", "exit 3", "--tty", "--root"]"#), "{text}");
        assert!(text.contains("tty: true") && text.contains(r#"env: ["A=b"]"#), "{text}");
        assert!(text.contains(DEFAULT_ROOT), "{text}");
    }
}

#[test]
fn mistakes_are_usage_errors() {
    for arguments in [
        &["create"][..],
        &["create", "a", "b"],
        &["nope"],
        &["run", "--detach", "--timeline", "c"],
        &["list", "--format", "yaml"],
        &["ps", "--format", "yaml", "c"],
        &["events", "--interval", "0s", "c"],
        &["update", "--memory", "much", "c"],
        &["--log-format", "xml", "list"],
    ] {
        let result = Cli::try_parse_from([&["isopod"], arguments].concat());
        assert!(result.unwrap_err().use_stderr(), "{arguments:?}");
    }
}

#[test]
fn dashes_between_the_programs_arguments_are_the_programs() {
    let text = format!("{:?}", parse(&["exec", "c", "--cwd", "/tmp", "ls", "-a", "--", "."]));
    assert!(text.contains(r#"["ls", "-a", "--", "."]"#), "{text}");
}

//! Looking at containers from outside.

use crate::engine::Run;

/// `top` shows the container's processes.
pub fn top(run: &Run<'_>) {
    let container = run.start_shell(&[], "sleep 1111 & sleep 2222");
    container.shell("until [ $(ps -o args | grep -c '^sleep') = 2 ]; do :; done");
    let table = container.ok(&["top"]);
    // Of the host, those that the runtime names, or that whoever enters its namespace finds.
    let expected = match run.isopod() {
        true => ["isopod", "isopod-vmm"],
        false => ["sleep 1111", "sleep 2222"],
    };
    assert!(!table.contains("[kthreadd]"), "processes of the host: {table}");
    assert!(expected.iter().all(|line| table.contains(line)), "only {table}");
    container.remove();
}

/// `top` with options of ps: Podman then runs that one in the container.
///
/// Podman before 4.7 may print what ps said before it has read all of it (its pull request 19595), with
/// any runtime. So a table that lacks lines is asked for again; one with other lines fails at once.
pub fn top_by_ps(run: &Run<'_>) {
    let container = run.start_shell(&[], "sleep 1111 & sleep 2222");
    container.shell("until [ $(ps -o args | grep -c '^sleep') = 2 ]; do :; done");
    for _ in 0..10 {
        let table = run.end(container.command(&["top"], &["-o", "args"])).ok().stdout;
        let lines: Vec<&str> = table.lines().collect();
        if lines.iter().filter(|line| line.starts_with("sleep ")).count() == 2 {
            container.remove();
            return;
        }
        assert!(lines.first().is_none_or(|line| *line == "COMMAND"), "{table}");
    }
    panic!("ten tables without both of the container's processes");
}

/// `stats` shows memory in use and processes.
pub fn stats(run: &Run<'_>) {
    let container = run.start(&["--memory=300m"], &["sleep", "1000"]);
    let format = "{{.MemUsage}};{{.PIDs}}";
    let line = run.ok(&["stats", "--no-stream", "--format", format, &container.name]);
    let (memory, pids) = line.split_once(';').unwrap_or_else(|| panic!("{line}"));
    let (used, limit) = memory.split_once(" / ").unwrap_or_else(|| panic!("{line}"));
    assert!(!used.starts_with("0B") && used.ends_with('B'), "{line}");
    // Docker reads it from the host's cgroup, and a microVM's own limit is inside.
    let inside = run.isopod() && !run.podman();
    assert!(inside || ["300MiB", "314.6MB"].contains(&limit), "{line}");
    // Of a microVM, the threads that stand for it are counted.
    let count: u32 = pids.parse().unwrap_or_default();
    assert!(if run.isopod() { count > 1 } else { count == 1 }, "{line}");
    container.remove();
}

/// `inspect` and `ps` tell of a process of the host's that is the container.
pub fn inspect(run: &Run<'_>) {
    let container = run.start(&[], &["sleep", "1000"]);
    let pid = container.inspect(".State.Pid");
    let process = run.end(run.engine.inside(&["cat", &format!("/proc/{pid}/cmdline")])).ok();
    let expected = if run.isopod() { "isopod" } else { "sleep" };
    assert!(process.stdout.starts_with(expected), "{process}");
    let names = run.ok(&["ps", "--format", "{{.Names}} {{.Status}}"]);
    assert!(names.starts_with(&format!("{} Up", container.name)), "{names}");
    container.remove();
}

/// `events` tells of a container's life in order.
pub fn events(run: &Run<'_>) {
    let container = run.named();
    let command = run.command("run", &["--name", &container.name], &["sh", "-c", "exit 6"]);
    assert_eq!(run.end(command).status, 6);
    container.remove();
    let filter = format!("container={}", container.name);
    let format = if run.podman() { "{{.Status}}" } else { "{{.Action}}" };
    // Docker counts that time in whole seconds, so this is the end of the one that is running. Podman
    // stops reading at such a time, even if it has only begun.
    let end = if run.podman() { "--stream=false" } else { "--until=-1s" };
    let said = run.ok(&["events", "--since=10m", end, "--filter", &filter, "--format", format]);
    let expected: &[&str] = if run.podman() {
        &["create", "start", "died", "remove"]
    } else {
        &["create", "start", "die", "destroy"]
    };
    let order: Vec<&str> = said.lines().filter(|action| expected.contains(action)).collect();
    assert_eq!(order, expected, "{said}");
}

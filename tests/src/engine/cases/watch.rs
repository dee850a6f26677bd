//! Containers seen from outside.

use crate::engine::Run;

/// `top` shows the container's processes.
pub fn top(run: &Run<'_>) {
    let container = run.start_shell(&[], "sleep 1111 & sleep 2222");
    container.shell("until [ $(ps -o args | grep -c '^sleep') = 2 ]; do :; done");
    let table = container.ok(&["top"]);
    // Of the host's processes, those that the runtime names, or those visible in the namespace that
    // Podman joins.
    let expected = match run.isopod() {
        true => ["isopod", "isopod-vmm"],
        false => ["sleep 1111", "sleep 2222"],
    };
    assert!(!table.contains("[kthreadd]"), "processes of the host: {table}");
    assert!(expected.iter().all(|line| table.contains(line)), "only {table}");
    container.remove();
}

/// `top` with options of ps: Podman then runs ps in the container.
///
/// Podman before 4.7 may print the output of ps before reading all of it (its pull request 19595),
/// with any runtime. So a table that lacks lines is asked for again. A table with other lines fails
/// at once.
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
    // Docker reads the limit from the host's cgroup, but a microVM's own limit is inside.
    let inside = run.isopod() && !run.podman();
    assert!(inside || ["300MiB", "314.6MB"].contains(&limit), "{line}");
    // Of a microVM, the host's threads are counted.
    let count: u32 = pids.parse().unwrap_or_default();
    assert!(if run.isopod() { count > 1 } else { count == 1 }, "{line}");
    container.remove();
}

/// `inspect` and `ps` name a process of the host for the container.
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

/// `events` reports a container's life in order.
pub fn events(run: &Run<'_>) {
    let container = run.named();
    let command = run.command("run", &["--name", &container.name], &["sh", "-c", "exit 6"]);
    assert_eq!(run.end(command).status, 6);
    container.remove();
    let filter = format!("container={}", container.name);
    let format = if run.podman() { "{{.Status}}" } else { "{{.Action}}" };
    // Docker counts `--until` in whole seconds, so `-1s` is the end of the current second. Podman
    // stops reading at that time, even if it has only begun.
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

//! Tasks by `ctr`, containerd's own client: a shim without Kubernetes.

use std::path::PathBuf;

use isopod_tests::engine::{IMAGE, Run};
use isopod_tests::{Command, Output};

/// A task that runs until it is removed.
struct Task<'r, 'e> {
    run: &'r Run<'e>,
    id: String,
}

/// The image as containerd names it.
fn image() -> String {
    format!("docker.io/library/{IMAGE}:latest")
}

/// `ctr run` of a command.
fn create<'e>(run: &Run<'e>, options: &[&str], id: &str, command: &[&str]) -> Command<'e> {
    let runtime = format!("io.containerd.{}.v2", run.with.name());
    let cgroup = format!("{}/{id}", run.engine.cgroup());
    let fixed = ["run", "--runtime", &runtime, "--cgroup", &cgroup];
    run.client(&fixed).args(options).args([&image(), id]).args(command)
}

impl<'r, 'e> Task<'r, 'e> {
    fn start(run: &'r Run<'e>, options: &[&str], script: &str) -> Self {
        let id = run.name("task");
        let options = [&["--detach", "--null-io"], options].concat();
        run.end(create(run, &options, &id, &["/bin/sh", "-c", script])).ok();
        Self { run, id }
    }

    fn ctr(&self, verb: &[&str], rest: &[&str]) -> Output {
        let id: &str = &self.id;
        self.run.output(&[&["task"], verb, &[id], rest].concat())
    }

    fn exec<'c>(&'c self, exec_id: &'c str, options: &[&str], script: &str) -> Command<'e> {
        let verb = ["task", "exec", "--exec-id", exec_id];
        self.run.client(&verb).args(options).args([&self.id]).args(["/bin/sh", "-c", script])
    }

    fn status(&self) -> String {
        let tasks = self.run.ok(&["task", "ls"]);
        let line = tasks.lines().find(|line| line.starts_with(&self.id)).unwrap_or_default();
        line.split_whitespace().last().unwrap_or_default().to_owned()
    }

    /// Kills the task and removes it. Returns what the client says of it.
    fn remove(self) -> Output {
        let removed = self.ctr(&["delete", "--force"], &[]);
        self.run.ok(&["container", "delete", &self.id]);
        removed
    }
}

/// A task from its creation to its end.
pub(crate) fn task(run: &Run<'_>) {
    let id = run.name("short");
    let command = ["/bin/sh", "-c", "echo out; echo err >&2; exit 3"];
    let out = run.end(create(run, &["--rm"], &id, &command));
    assert_eq!((out.status, &*out.stdout, &*out.stderr), (3, "out\n", "err\n"), "{out}");
    // A missing program is an error of the creation, and leaves no task.
    let out = run.end(create(run, &["--rm"], &id, &["/bin/missing"]));
    assert!(out.status != 0 && out.stderr.contains("/bin/missing"), "{out}");

    let task = Task::start(run, &[], "sleep 1000");
    let out = run.end(task.exec("one", &[], "echo inside; exit 4"));
    assert_eq!((out.status, &*out.stdout), (4, "inside\n"), "{out}");
    let out = run.end(task.exec("two", &[], "kill -TERM $$"));
    assert_eq!(out.status, 143, "{out}");
    for (verb, status) in [("pause", "PAUSED"), ("resume", "RUNNING")] {
        task.ctr(&[verb], &[]).ok();
        assert_eq!(task.status(), status);
    }
    // The pid of the host stands for the task: its root file system is the task's.
    let tasks = run.ok(&["task", "ls"]);
    let line = tasks.lines().find(|line| line.starts_with(&task.id)).expect("the task");
    let pid = line.split_whitespace().nth(1).expect("a pid");
    let root = format!("/proc/{pid}/root/bin/probe");
    run.end(run.engine.inside(&["test", "-x", &root])).ok();
    let metrics = task.ctr(&["metrics"], &[]).ok().stdout;
    assert!(metrics.contains("memory") && metrics.contains("cpu"), "{metrics}");
    assert!(task.ctr(&["ps"], &[]).ok().stdout.lines().count() > 1);
    task.ctr(&["kill", "--signal", "KILL"], &[]).ok();
    // The client waits for the end, and warns of the task's exit status.
    let out = task.remove().ok();
    assert!(out.stderr.contains("137"), "{out}");
}

/// 64 MiB each way, through the fifos of a process.
pub(crate) fn streams(run: &Run<'_>) {
    let task = Task::start(run, &[], "sleep 1000");
    let input = PathBuf::from(run.engine.path(&run.name("input")));
    let half = (0_u32..32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8);
    let bytes: Vec<u8> = half.collect();
    std::fs::write(&input, [&bytes[..], &bytes].concat()).expect("the input");
    let (file, output) = (input.to_string_lossy(), run.engine.path(&run.name("output")));
    let exec = ["task", "exec", "--exec-id", "copy", &task.id, "/bin/cat"];
    let script = client_file(run);
    let line = format!("sh {script} {} <{file} >{output}", exec.join(" "));
    run.end(run.engine.inside(&["sh", "-c", &line])).ok();
    assert!(std::fs::read(&output).expect("the output") == std::fs::read(&input).expect("input"));
    for file in [&*file, &output, &script] {
        std::fs::remove_file(file).expect("a file");
    }
    task.remove().ok();
}

/// Each event once and in its order.
pub(crate) fn events(run: &Run<'_>) {
    let mut events = run.client(&["events"]).spawn();
    let task = Task::start(run, &[], "sleep 1000");
    let out = run.end(task.exec("one", &[], "exit 4"));
    assert_eq!(out.status, 4, "{out}");
    task.ctr(&["pause"], &[]).ok();
    task.ctr(&["resume"], &[]).ok();
    let id = task.id.clone();
    task.remove().ok();
    let mut seen = Vec::new();
    loop {
        let line = events.stdout.line().expect("an event");
        let topic = line.split_whitespace().find(|word| word.starts_with("/tasks/"));
        if let Some(topic) = topic.filter(|_| line.contains(&id)) {
            seen.push(topic.to_owned());
            let of_exec = line.contains("\"one\"") || line.contains("exec_id");
            if topic == "/tasks/delete" && !of_exec {
                break;
            }
        }
    }
    events.kill();
    events.wait();
    let expected = [
        "create",
        "start",
        "exec-added",
        "exec-started",
        "exit",
        "delete",
        "paused",
        "resumed",
        "exit",
        "delete",
    ];
    let expected = expected.map(|topic| format!("/tasks/{topic}"));
    // The client deletes the exec, and nobody says when its deletion is told.
    let mut wanted = expected.to_vec();
    let of_exec = |seen: &[String]| seen.iter().filter(|t| *t == "/tasks/delete").count();
    if of_exec(&seen) == 1 {
        wanted.remove(5);
    }
    assert_eq!(seen, wanted);
}

/// A script in the engine's directory that calls the client.
fn client_file(run: &Run<'_>) -> String {
    let path = run.engine.path(&run.name("ctr"));
    std::fs::write(&path, run.engine.client_script()).expect("the client");
    path
}

/// A terminal of the client's size, for a task and for an exec.
pub(crate) fn terminal(run: &Run<'_>) {
    let (client, id) = (client_file(run), run.name("tty"));
    let runtime = format!("io.containerd.{}.v2", run.with.name());
    let cgroup = format!("{}/{id}", run.engine.cgroup());
    // The client tells the size when the process has been started.
    let show =
        "tty; until stty size | grep -q 0; do sleep 0.1; done 2>/dev/null; stty size; exit 5";
    let on_terminal = |command: &str| {
        let line = format!("stty rows 40 cols 101; sh {client} {command}; echo status $?");
        run.end(run.engine.inside(&["script", "-qec", &line, "/dev/null"])).ok().stdout
    };
    let run_task = "run --rm --tty --runtime";
    let image = image();
    let out = on_terminal(&format!(
        "{run_task} {runtime} --cgroup {cgroup} {image} {id} /bin/sh -c '{show}'"
    ));
    let lines: Vec<&str> = out.lines().map(str::trim_end).collect();
    assert!(lines[0].ends_with("/dev/pts/0"), "{out}");
    assert_eq!(lines[1..], ["40 101", "status 5"], "{out}");
    let task = Task::start(run, &[], "sleep 1000");
    let id = &task.id;
    let out = on_terminal(&format!("task exec --tty --exec-id one {id} /bin/sh -c '{show}'"));
    assert!(out.contains("/dev/pts/") && out.contains("status 5"), "{out}");
    task.remove().ok();
    std::fs::remove_file(client).expect("the client");
}

/// Output to a file, and to a program.
pub(crate) fn logs(run: &Run<'_>) {
    let (id, file) = (run.name("log"), run.engine.path(&run.name("file")));
    let command = ["/bin/sh", "-c", "echo out; echo err >&2"];
    let options = ["--rm", "--log-uri", &format!("file://{file}")];
    run.end(create(run, &options, &id, &command)).ok();
    let mut lines: Vec<String> = read(&file).lines().map(str::to_owned).collect();
    lines.sort();
    assert_eq!(lines, ["err", "out"]);
    let program = run.engine.path(&run.name("program"));
    // runc's shim sends it SIGTERM when the outputs have ended.
    let script = "#!/bin/sh\ntrap '' TERM\nexec 5>&-\n(cat <&4 >$1.err) &\ncat <&3 >$1\nwait\n\
                  echo $CONTAINER_ID >$1.id\n";
    std::fs::write(&program, script).expect("a program");
    run.end(run.engine.inside(&["chmod", "755", &program])).ok();
    let options = ["--rm", "--log-uri", &format!("binary://{program}?{file}")];
    run.end(create(run, &options, &id, &command)).ok();
    let begun = std::time::Instant::now();
    while !std::path::Path::new(&format!("{file}.id")).exists() {
        assert!(begun.elapsed().as_secs() < 30, "the program does not end");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let (out, err) = (read(&file), read(&format!("{file}.err")));
    assert_eq!((&*out, &*err, read(&format!("{file}.id")).trim_end()), ("out\n", "err\n", &*id));
    if run.isopod() {
        ready_by_a_byte(run, &id, &program, &command);
    }
}

/// `binary-v2://`, which runc's shim of the tests' containerd does not know yet: a program that has
/// not written a byte is not ready.
fn ready_by_a_byte(run: &Run<'_>, id: &str, program: &str, command: &[&str]) {
    let file = run.engine.path(&run.name("file2"));
    let uri = format!("binary-v2://{program}?{file}");
    let options = ["--rm", "--log-uri", &uri];
    let out = run.end(create(run, &options, id, command));
    assert!(out.status != 0 && out.stderr.contains("CONTAINER_WAIT"), "{out}");
    let script = "#!/bin/sh\necho >&5\nexec 5>&-\ncat <&3 >$1\n";
    std::fs::write(program, script).expect("a program");
    run.end(create(run, &options, id, command)).ok();
    let begun = std::time::Instant::now();
    while std::fs::read_to_string(&file).ok().as_deref() != Some("out\n") {
        assert!(begun.elapsed().as_secs() < 30, "the program does not log");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// containerd is killed and started again. The task goes on, and its exit status is known.
pub(crate) fn restart(run: &Run<'_>) {
    let task = Task::start(run, &[], "sleep 1000");
    run.engine.kill_containerd_daemon();
    run.engine.start_containerd_daemon();
    assert_eq!(task.status(), "RUNNING");
    let out = run.end(task.exec("one", &[], "echo inside; exit 4"));
    assert_eq!((out.status, &*out.stdout), (4, "inside\n"), "{out}");
    let task = {
        // It ends while containerd is away.
        task.remove().ok();
        let task = Task::start(run, &[], "sleep 4; exit 7");
        run.engine.kill_containerd_daemon();
        std::thread::sleep(std::time::Duration::from_secs(5));
        run.engine.start_containerd_daemon();
        task
    };
    let status = task.status();
    // containerd 1.6 knows of such a task with runc's shim.
    if run.isopod() || !status.is_empty() {
        assert_eq!(status, "STOPPED");
        let out = task.remove().ok();
        assert!(out.stderr.contains("exit code 7"), "{out}");
    } else {
        // Later versions forget a task of runc's shim that has no process any more.
        run.ok(&["container", "delete", &task.id]);
    }
}

/// The shim is killed. containerd hears of it, and nothing is left.
pub(crate) fn killed_shim(run: &Run<'_>) {
    let task = Task::start(run, &[], "sleep 1000");
    let pattern = if run.isopod() { "isopod-v2" } else { "runc-v2" };
    let line = format!("pgrep -f 'containerd-shim-{pattern}.*{}'", task.id);
    let pids = run.end(run.engine.inside(&["sh", "-c", &line])).ok().stdout;
    for pid in pids.split_whitespace() {
        run.end(run.engine.inside(&["kill", "-9", pid]));
    }
    for _ in 0..100 {
        if task.status() != "RUNNING" {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    assert_ne!(task.status(), "RUNNING");
    run.output(&["task", "delete", "--force", &task.id]);
    run.ok(&["container", "delete", &task.id]);
    if !run.isopod() {
        // runc's shim leaves its socket.
        run.end(run.engine.inside(&["sh", "-c", "rm /run/containerd/s/*"])).ok();
    }
}

/// An annotation that the operator has not allowed is refused by name, and a misspelt one too.
pub(crate) fn annotation(run: &Run<'_>) {
    for (annotation, why) in [
        ("dev.isopod.vcpus=1", "annotation dev.isopod.vcpus is not allowed"),
        ("dev.isopod.cpus=1", "dev.isopod.cpus"),
    ] {
        let options = ["--rm", "--annotation", annotation];
        let out = run.end(create(run, &options, &run.name("refused"), &["/bin/true"]));
        assert_ne!(out.status, 0, "{out}");
        assert!(out.stderr.contains(why), "{out}");
    }
}

//! containerd with its own shim for runc, which calls any runtime by its path (`BinaryName`).

use crate::bundle::Bundle;
use crate::command::{Command, Output};
use crate::engine::Run;

/// The client of containerd that comes with it.
const CLIENT: &str = "/usr/bin/ctr";

/// The socket of the containerd that Docker starts for itself.
const SOCKET: &str = "/run/docker/containerd/containerd.sock";

/// Directories that containerd and its client make once and keep, in their order of removal.
const KEPT: [&str; 4] = [
    "/run/containerd/fifo",
    "/run/containerd/runc/isopod-test",
    "/run/containerd/runc",
    "/run/docker/containerd/daemon/io.containerd.runtime.v2.task/isopod-test",
];

/// A task from its creation to its end, by containerd's client.
pub fn containerd_task(run: &Run<'_>) {
    let bundle = Bundle::new(run.engine.dir().join(run.name("bundle")));
    let rootfs = bundle.rootfs("/").to_string_lossy().into_owned();
    let id = run.name("task");
    // Without an image there is no PATH.
    let hello = ["/bin/sh", "-c", "echo hello; exit 3"];
    let out = run.end(create(run, &["--rm"], &rootfs, &id, &hello));
    assert_eq!((out.status, &*out.stdout), (3, "hello\n"), "{out}");

    let sleep = ["/bin/sleep", "1000"];
    run.end(create(run, &["--detach", "--null-io"], &rootfs, &id, &sleep)).ok();
    let exec = ["task", "exec", "--exec-id", "one", &id, "/bin/sh", "-c", "echo inside; exit 4"];
    let out = ctr(run, &exec);
    assert_eq!((out.status, &*out.stdout), (4, "inside\n"), "{out}");
    for (verb, status) in [("pause", "PAUSED"), ("resume", "RUNNING")] {
        ctr(run, &["task", verb, &id]).ok();
        let tasks = ctr(run, &["task", "ls"]).ok().stdout;
        let line = tasks.lines().find(|line| line.starts_with(&id)).unwrap_or_default();
        assert!(line.ends_with(status), "{tasks}");
    }
    assert!(ctr(run, &["task", "metrics", &id]).ok().stdout.contains("memory"));
    assert!(ctr(run, &["task", "ps", &id]).ok().stdout.lines().count() > 1);
    ctr(run, &["task", "kill", "--signal", "KILL", &id]).ok();
    // The client waits for the end, and warns of the task's exit status.
    let out = ctr(run, &["task", "delete", "--force", &id]).ok();
    assert!(out.stderr.contains("137"), "{out}");
    ctr(run, &["container", "delete", &id]).ok();
    std::fs::remove_dir_all(&bundle.dir).expect("the bundle");
    run.end(run.engine.inside(&[&["rmdir"], &KEPT[..]].concat())).ok();
}

/// `ctr run` of a root file system on disk.
fn create<'e>(
    run: &Run<'e>,
    options: &[&str],
    rootfs: &str,
    id: &str,
    command: &[&str],
) -> Command<'e> {
    let (cgroup, runtime) = (format!("{}/{id}", run.engine.cgroup()), run.with.path());
    let fixed = ["run", "--rootfs", "--runtime", "io.containerd.runc.v2"];
    let own = ["--runc-binary", &runtime, "--cgroup", &cgroup];
    client(run).args(fixed).args(own).args(options).args([rootfs, id]).args(command)
}

fn ctr(run: &Run<'_>, args: &[&str]) -> Output {
    run.end(client(run).args(args))
}

fn client<'e>(run: &Run<'e>) -> Command<'e> {
    run.engine.inside(&[CLIENT, "--address", SOCKET, "--namespace", "isopod-test"])
}

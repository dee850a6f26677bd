//! Docker: its daemon as a child of the engine's subreaper, with a containerd of its own.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Engine, IMAGE, Kind, With};
use crate::command::Command;
use crate::deadline::DEADLINE;

/// The client's full path: `PATH` may hold another program named docker.
const CLIENT: &str = "/usr/bin/docker";
const DAEMON: &str = "/usr/sbin/dockerd";
const CONTAINERD: &str = "/usr/bin/containerd";

/// The pause between two looks at a state that the engine does not report.
const LOOK: Duration = Duration::from_millis(100);

impl Engine {
    /// Starts this machine's docker.io, Debian's package.
    pub fn docker() -> Self {
        Self::start_docker(None)
    }

    /// Starts the docker.io of a Debian tree.
    pub fn docker_of(tree: &Path) -> Self {
        Self::start_docker(Some(tree))
    }

    fn start_docker(tree: Option<&Path>) -> Self {
        let engine = Self::build(Kind::Docker, tree);
        engine.configure(With::Runc);
        // The daemon gives its containerd 15 s to answer, and a lab reads its files from a shared
        // directory. So the programs are read into the page cache first.
        engine
            .inside(&["sh", "-c", &format!("cat {DAEMON} {CONTAINERD} >/dev/null")])
            .output()
            .ok();
        let script = "exec \"$0\" --config-file \"$1/daemon.json\" >\"$1/daemon.log\" 2>&1";
        let dir = engine.path("");
        let job = engine.inside(&["sh", "-c", script, DAEMON, dir.trim_end_matches('/')]).spawn();
        let daemon = job.pid;
        engine.daemon.set(Some(daemon));
        engine.await_socket(daemon, "docker.sock");
        // `version` returns when the daemon is up.
        let version = engine.client(With::Runc).args(["version"]).output();
        assert_eq!(version.status, 0, "{version}\ndockerd: {}", engine.daemon_log());
        engine.import();
        engine
    }

    /// Writes the daemon's configuration. `default` is the runtime of a container that names none.
    fn configure(&self, default: With) {
        let config = json!({
            "data-root": self.path("docker"),
            "exec-root": "/run/docker",
            "pidfile": "/run/docker.pid",
            "hosts": [format!("unix://{}", self.path("docker.sock"))],
            "runtimes": self.docker_runtimes(),
            "default-runtime": default.name(),
            "cgroup-parent": self.cgroup(),
            "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "storage-driver": "overlay2",
            "shutdown-timeout": 15,
        });
        fs::write(self.dir().join("daemon.json"), config.to_string()).expect("daemon.json");
    }

    /// The runtimes of the configuration. Docker before 23 takes no shim.
    fn docker_runtimes(&self) -> Value {
        let isopod = With::Isopod.path();
        let shim = Path::new(&isopod).with_file_name("containerd-shim-isopod-v2");
        let mut runtimes = json!({ "isopod": { "path": isopod } });
        if self.of_tree {
            runtimes["isopod-shim"] = json!({ "runtimeType": shim });
        }
        runtimes
    }

    /// Makes the daemon use another runtime for containers that name none.
    pub fn set_default_runtime(&self, default: With) {
        self.configure(default);
        let said = |log: &str| log.matches("Reloaded configuration").count();
        let before = said(&self.daemon_log());
        let daemon = self.daemon.get().expect("a daemon");
        self.scope.keeper().signal(daemon, libc::SIGHUP).expect("a daemon that lives");
        let begun = Instant::now();
        while said(&self.daemon_log()) == before {
            assert!(begun.elapsed() < DEADLINE, "dockerd: {}", self.daemon_log());
            std::thread::sleep(LOOK);
        }
    }

    /// The daemon's log, empty if there is none.
    pub fn daemon_log(&self) -> String {
        fs::read_to_string(self.dir().join("daemon.log")).unwrap_or_default()
    }

    /// Waits until the daemon listens at a socket in the engine's directory. It answers later.
    pub(super) fn await_socket(&self, daemon: i32, name: &str) {
        let begun = Instant::now();
        while UnixStream::connect(self.dir().join(name)).is_err() {
            let ended = self.scope.keeper().ended(daemon);
            let late = begun.elapsed() > DEADLINE;
            assert!(ended.is_none() && !late, "no daemon: {ended:?} {}", self.daemon_log());
            std::thread::sleep(LOOK);
        }
    }

    pub(super) fn docker_client(&self) -> Command<'_> {
        let host = format!("unix://{}", self.path("docker.sock"));
        // A client's configuration in a home directory is not for tests.
        let config = self.path("client");
        self.inside(&[CLIENT, "--config", &config, "--host", &host]).env("DOCKER_BUILDKIT", "0")
    }

    pub(super) fn docker_script(&self) -> String {
        let (config, socket) = (self.path("client"), self.path("docker.sock"));
        format!("#!/bin/sh\nexec {CLIENT} --config {config} --host unix://{socket} \"$@\"\n")
    }

    fn import(&self) {
        let archive = self.image_archive();
        self.client(With::Runc).args(["import", &archive, IMAGE]).output().ok();
    }

    pub(super) fn end_daemon(&self, daemon: i32) {
        self.scope.keeper().signal(daemon, libc::SIGTERM).expect("a daemon that lives");
        let end = self.scope.keeper().wait(daemon, DEADLINE);
        let end = end.unwrap_or_else(|| panic!("the daemon does not end: {}", self.daemon_log()));
        assert_eq!(end.status(), 0, "the daemon: {}", self.daemon_log());
    }
}

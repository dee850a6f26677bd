//! The host's side: starts the agent, connects streams and makes calls.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use isopod_protocol::agent::{
    ContainerRef, CreateContainerRequest, Empty, ExecProcessRequest, ProcessExit, ProcessRef,
    SignalProcessRequest, StreamTokens,
};
use isopod_protocol::agent_ttrpc::AgentClient;
use protobuf::MessageField;
use serde_json::{Value, json};
use ttrpc::Code;
use ttrpc::context::Context;

use super::io::{Io, Outcome};

pub(crate) use isopod_agent::INIT_NAME;

/// Descriptors of the listening sockets in the agent.
const AGENT_FD: i32 = 100;
const STREAMS_FD: i32 = 101;

/// The agent's part of the test: builds a root file system, then runs the agent.
pub(crate) fn run_agent(dir: &str) -> ! {
    let rootfs = Path::new(dir);
    // The agent seals its root, so containers write to a file system of their own.
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("tmpfs", rootfs, "tmpfs", flags, None).unwrap();
    for dir in ["bin", "etc", "tmp", "proc", "dev", "sys", "home", "src"] {
        fs::create_dir(rootfs.join(dir)).unwrap();
    }
    fs::copy("/bin/busybox", rootfs.join("bin/busybox")).unwrap();
    for applet in [
        "sh", "cat", "true", "id", "ls", "sleep", "mount", "stat", "tty", "stty", "ps", "hostname",
        "mknod", "head", "grep", "readlink", "touch", "wc", "kill", "dd", "sync", "ip", "chmod",
        "mkdir", "ln", "test", "echo",
    ] {
        std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
    }
    fs::write(rootfs.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nu:x:7:7::/home/u:/bin/sh\n")
        .unwrap();
    fs::write(rootfs.join("etc/plain"), "not a program\n").unwrap();
    fs::write(rootfs.join("bin/broken"), "\x7fELF broken").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(rootfs.join("bin/broken"), mode).unwrap();
    // SAFETY: the driver has put the listeners there for this process.
    let own = |fd| unsafe { OwnedFd::from_raw_fd(fd) };
    let (agent, streams) = (own(AGENT_FD), own(STREAMS_FD));
    for fd in [&agent, &streams] {
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC).unwrap();
    }
    let why = isopod_agent::run_on(isopod_agent::Listeners { agent, streams }, || ());
    panic!("{why}");
}

/// Counts of objects that the agent holds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Resources {
    descriptors: usize,
    mounts: usize,
    processes: usize,
    cgroups: usize,
}

pub(crate) struct Driver {
    dir: PathBuf,
    unshare: Child,
    pub(crate) client: AgentClient,
    next: AtomicU64,
}

impl Driver {
    pub(crate) async fn start() -> Self {
        let dir = std::env::temp_dir().join(format!("isopod-agent-{}", std::process::id()));
        fs::create_dir_all(dir.join("rootfs")).unwrap();
        let agent = UnixListener::bind(dir.join("agent")).unwrap();
        let streams = UnixListener::bind(dir.join("streams")).unwrap();
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--net", "--fork", "--kill-child", "--"]);
        command.arg(std::env::current_exe().unwrap()).arg("agent").arg(dir.join("rootfs"));
        let fds = [(agent.as_raw_fd(), AGENT_FD), (streams.as_raw_fd(), STREAMS_FD)];
        let install = move || {
            for (from, to) in fds {
                // SAFETY: both numbers are free in the child but for the listeners themselves.
                if unsafe { libc::dup2(from, to) } < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            // Ignored signals that the agent inherits must not reach the containers.
            for signal in [libc::SIGQUIT, libc::SIGHUP, libc::SIGRTMAX()] {
                // SAFETY: no handler is installed.
                unsafe { libc::signal(signal, libc::SIG_IGN) };
            }
            Ok(())
        };
        // SAFETY: `install` only duplicates descriptors and ignores signals.
        unsafe { std::os::unix::process::CommandExt::pre_exec(&mut command, install) };
        let unshare = command.spawn().expect("unshare(1) starts the agent");
        let address = format!("unix://{}", dir.join("agent").display());
        let client = AgentClient::new(ttrpc::r#async::Client::connect(&address).await.unwrap());
        let driver = Self { dir, unshare, client, next: AtomicU64::new(1) };
        // The first answer shows that the agent is up.
        let missing = ContainerRef { container_id: "none".into(), ..Default::default() };
        let answer = driver.client.list_processes(context(), &missing).await;
        assert_eq!(code(answer.unwrap_err()).0, Code::NOT_FOUND);
        driver
    }

    /// The agent's pid in this process's namespace.
    pub(crate) fn agent_pid(&self) -> u32 {
        let pid = self.unshare.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        children.trim().parse().unwrap()
    }

    pub(crate) async fn resources(&self) -> Resources {
        let pid = self.agent_pid();
        let entries = |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count();
        let mounts = fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap().lines().count();
        let children = format!("/proc/{pid}/task/{pid}/children");
        let processes = fs::read_to_string(children).unwrap().split_whitespace().count();
        let cgroups = format!("/proc/{pid}/root/sys/fs/cgroup/containers");
        let cgroups = fs::read_dir(cgroups).unwrap();
        let cgroups = cgroups.flatten().filter(|e| e.file_type().unwrap().is_dir()).count();
        Resources { descriptors: entries("fd"), mounts, processes, cgroups }
    }

    /// Waits until the counts are as before, since the last connections close late.
    pub(crate) async fn settle(&self, before: &Resources) {
        let mut now = self.resources().await;
        for _ in 0..100 {
            if now == *before {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
            now = self.resources().await;
        }
        panic!("left over: {before:?} before, {now:?} after");
    }

    /// Ends the agent as the host does.
    pub(crate) async fn stop(mut self) {
        let _ = self.client.shutdown(context(), &Empty::default()).await;
        self.unshare.wait().unwrap();
    }

    /// A name that no other container or process of this run has.
    pub(crate) fn name(&self) -> String {
        format!("t{}-{}", std::process::id(), self.token())
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    /// A file of the containers' root, seen from the driver.
    pub(crate) fn file(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{}{path}", self.agent_pid(), self.rootfs().display()))
    }

    /// A specification that runs a shell command, close to that of `runc spec`.
    pub(crate) fn spec(&self, script: &str) -> Value {
        let caps = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
        json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": ["sh", "-c", script],
                "env": ["PATH=/bin", "TERM=xterm"],
                "cwd": "/",
                "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
                "noNewPrivileges": true,
            },
            "root": {"path": self.rootfs()},
            "hostname": "pod",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                 "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
                {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                 "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
                {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
                 "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/sys", "type": "sysfs", "source": "sysfs",
                 "options": ["nosuid", "noexec", "nodev", "ro"]},
                {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                 "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
            ],
            "linux": {
                "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                               {"type": "cgroup"}, {"type": "network"}],
                "resources": {"devices": [{"allow": false, "access": "rwm"}]},
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/sys/firmware", "/proc/scsi"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"],
            },
        })
    }

    /// Connects three streams.
    pub(crate) fn io(&self) -> Io {
        self.connect(true)
    }

    /// Connects input and output of a terminal.
    pub(crate) fn terminal_io(&self) -> Io {
        self.connect(false)
    }

    /// The token of a stream that is not connected yet.
    pub(crate) fn token(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn connect_stream(&self, token: u64) -> UnixStream {
        let mut stream = UnixStream::connect(self.dir.join("streams")).unwrap();
        stream.write_all(&token.to_le_bytes()).unwrap();
        stream
    }

    fn connect(&self, with_stderr: bool) -> Io {
        let connect = || {
            let token = self.token();
            (token, self.connect_stream(token))
        };
        let read = |mut stream: UnixStream| {
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                stream.read_to_end(&mut bytes).unwrap();
                bytes
            })
        };
        let ((stdin, input), (stdout, out)) = (connect(), connect());
        let (stderr, err) =
            if with_stderr { connect() } else { (0, UnixStream::pair().unwrap().0) };
        let tokens = StreamTokens { stdin, stdout, stderr, ..Default::default() };
        Io { tokens, stdin: input, out: read(out), err: read(err) }
    }

    pub(crate) async fn create(
        &self,
        id: &str,
        spec: &Value,
        tokens: Option<StreamTokens>,
    ) -> Result<u32, (Code, String)> {
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec_json: spec.to_string().into_bytes(),
            streams: MessageField::from_option(tokens),
            ..Default::default()
        };
        self.client.create_container(context(), &request).await.map(|r| r.pid).map_err(code)
    }

    pub(crate) async fn start_container(&self, id: &str) -> Result<(), (Code, String)> {
        let request = ContainerRef { container_id: id.into(), ..Default::default() };
        self.client.start_container(context(), &request).await.map(drop).map_err(code)
    }

    pub(crate) async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: &Value,
        tokens: Option<StreamTokens>,
    ) -> Result<u32, (Code, String)> {
        let request = ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process_json: process.to_string().into_bytes(),
            streams: MessageField::from_option(tokens),
            ..Default::default()
        };
        self.client.exec_process(context(), &request).await.map(|r| r.pid).map_err(code)
    }

    pub(crate) async fn wait(&self, id: &str, exec_id: &str) -> ProcessExit {
        self.try_wait(id, exec_id).await.unwrap()
    }

    pub(crate) async fn try_wait(
        &self,
        id: &str,
        exec_id: &str,
    ) -> Result<ProcessExit, (Code, String)> {
        self.client.wait_process(context(), &process_ref(id, exec_id)).await.map_err(code)
    }

    pub(crate) async fn signal(
        &self,
        id: &str,
        signal: i32,
        all: bool,
    ) -> Result<(), (Code, String)> {
        let request = SignalProcessRequest {
            container_id: id.into(),
            signal: signal.unsigned_abs(),
            all,
            ..Default::default()
        };
        self.client.signal_process(context(), &request).await.map(drop).map_err(code)
    }

    pub(crate) async fn delete(&self, id: &str) -> Result<(), (Code, String)> {
        let request = ContainerRef { container_id: id.into(), ..Default::default() };
        self.client.delete_container(context(), &request).await.map(drop).map_err(code)
    }

    /// Creates and starts a container that sleeps, for tests of further processes.
    pub(crate) async fn sleeping(&self, change: impl FnOnce(&mut Value)) -> String {
        let id = self.name();
        let mut spec = self.spec("while :; do sleep 1000; done");
        change(&mut spec);
        self.create(&id, &spec, None).await.unwrap();
        self.start_container(&id).await.unwrap();
        id
    }

    /// Kills a container and deletes it.
    pub(crate) async fn end(&self, id: &str) {
        let _ = self.signal(id, libc::SIGKILL, false).await;
        self.wait(id, "").await;
        self.delete(id).await.unwrap();
    }

    /// Runs a specification to its end.
    pub(crate) async fn run(&self, spec: &Value) -> Outcome {
        let id = self.name();
        let io = self.io();
        self.create(&id, spec, Some(io.tokens.clone())).await.unwrap();
        self.start_container(&id).await.unwrap();
        let exit = self.wait(&id, "").await;
        let outcome = io.finish(exit).await;
        self.delete(&id).await.unwrap();
        outcome
    }

    /// Runs a shell command in a container of its own.
    pub(crate) async fn sh(&self, script: &str) -> Outcome {
        self.run(&self.spec(script)).await
    }

    /// Runs a shell command in an existing container.
    pub(crate) async fn exec_sh(&self, id: &str, script: &str) -> Outcome {
        self.exec_process(id, &self.spec(script)["process"]).await
    }

    /// Runs a process in an existing container.
    pub(crate) async fn exec_process(&self, id: &str, process: &Value) -> Outcome {
        let exec_id = self.name();
        let io = self.io();
        self.exec(id, &exec_id, process, Some(io.tokens.clone())).await.unwrap();
        let exit = self.wait(id, &exec_id).await;
        io.finish(exit).await
    }
}

impl Drop for Driver {
    /// Removes the containers' cgroups too: they are in this machine's own tree, and end with the
    /// agent.
    fn drop(&mut self) {
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
        let _ = fs::remove_dir_all(&self.dir);
        for root in ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"] {
            let containers = Path::new(root).join("containers");
            for group in fs::read_dir(&containers).into_iter().flatten().flatten() {
                let _ = fs::remove_dir(group.path());
            }
            let _ = fs::remove_dir(containers);
        }
    }
}

pub(crate) fn context() -> Context {
    Context::default()
}

pub(crate) fn process_ref(id: &str, exec_id: &str) -> ProcessRef {
    ProcessRef { container_id: id.into(), exec_id: exec_id.into(), ..Default::default() }
}

pub(crate) fn code(e: ttrpc::Error) -> (Code, String) {
    match e {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        e => panic!("{e}"),
    }
}

//! A container as CRI-O's runtimes of type `vm` have it: one `start` of the shim, and calls of Task.

use std::fs;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::thread::{self, JoinHandle};

use isopod_tests::{Container, Scope, runtime};
use nix::sys::stat::Mode;
use serde_json::{Value, json};

use crate::ttrpc::{Answer, Client, Fields, Message, Status, answer};

/// Statuses of a task.
pub(crate) const CREATED: u64 = 1;
pub(crate) const RUNNING: u64 = 2;
pub(crate) const STOPPED: u64 = 3;

/// The code of gRPC for what does not exist.
pub(crate) const NOT_FOUND: u64 = 5;

/// A container that has a shim.
pub(crate) struct Task<'s> {
    scope: &'s Scope,
    pub(crate) container: Container<'s>,
    pub(crate) address: String,
    pub(crate) client: Client,
    /// Answered at the end.
    ended: Option<Receiver<Answer>>,
    /// Readers of standard output and standard error.
    output: [JoinHandle<String>; 2],
}

/// The outcome of a further process.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) status: u64,
    pub(crate) stdout: String,
}

/// The link under which CRI-O finds the shim.
fn program(scope: &Scope) -> PathBuf {
    let link = scope.dir().join("containerd-shim-isopod-v2");
    if !link.exists() {
        symlink(&runtime().path, &link).expect("a link to the shim");
    }
    link
}

/// Makes a fifo, and reads it to its end.
fn read(path: &Path) -> JoinHandle<String> {
    nix::unistd::mkfifo(path, Mode::from_bits_truncate(0o700)).expect("a fifo");
    let path = path.to_owned();
    thread::spawn(move || {
        let bytes = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        String::from_utf8(bytes).expect("text")
    })
}

impl<'s> Task<'s> {
    /// Starts the shim of a container, or finds that of its pod, and creates the task.
    #[track_caller]
    pub(crate) fn create(scope: &'s Scope, container: Container<'s>) -> Self {
        Self::try_create(scope, container).unwrap_or_else(|error| panic!("Create: {error:?}"))
    }

    /// Does the same, or returns the error of the creation.
    pub(crate) fn try_create(scope: &'s Scope, container: Container<'s>) -> Result<Self, Status> {
        container.bundle.write();
        let dir = container.bundle.dir.clone();
        // The log of the shim: CRI-O copies it to its own.
        drop(read(&dir.join("log")));
        let program = program(scope).to_string_lossy().into_owned();
        let arguments = ["-namespace", "default", "-address", "", "-publish-binary", "/bin/true"];
        let started = scope
            .program(&["sh", "-c", "cd \"$0\" && exec \"$@\"", &dir.to_string_lossy(), &program])
            .args(arguments)
            .args(["-id", &container.id, "start"])
            .env("TTRPC_ADDRESS", "")
            .env("GRPC_ADDRESS", "")
            .env("NAMESPACE", "default")
            .env("ISOPOD_BOOT_TIMEOUT", "120")
            .output()
            .ok();
        let address = started.stdout.trim().to_owned();
        assert_eq!(fs::read_to_string(dir.join("address")).expect("the address"), address);
        let mut client = Client::connect(&address);
        let output = ["stdout", "stderr"].map(|name| read(&dir.join(name)));
        let fifo = |name: &str| dir.join(name).to_string_lossy().into_owned();
        let request = Message::default()
            .text(1, &container.id)
            .text(2, &dir.to_string_lossy())
            .text(6, &fifo("stdout"))
            .text(7, &fifo("stderr"));
        let created = client.call("Create", &request).inspect_err(|_| {
            let id = Message::default().text(1, &container.id);
            assert_eq!(client.call("Delete", &id).unwrap_err().code, NOT_FOUND);
            // A shim that ends at once need not answer.
            let _ = client.begin("Shutdown", &id).recv();
        });
        let pid = created?.number(1);
        // CRI-O notes when the process has begun.
        assert!(fs::read_to_string(format!("/proc/{pid}/stat")).is_ok(), "{pid}");
        Ok(Self { scope, container, address, client, ended: None, output })
    }

    pub(crate) fn id(&self) -> Message {
        Message::default().text(1, &self.container.id)
    }

    /// Starts the process, and waits for its end in the background.
    pub(crate) fn start(&mut self) {
        let id = self.id();
        self.client.ok("Start", &id);
        self.ended = Some(self.client.begin("Wait", &id));
    }

    pub(crate) fn state(&mut self) -> Fields {
        let id = self.id();
        self.client.ok("State", &id)
    }

    /// Connects anew, as after a restart of CRI-O: by the file in the bundle.
    pub(crate) fn reconnect(&mut self) {
        let address = fs::read_to_string(self.container.bundle.dir.join("address"));
        self.client = Client::connect(address.expect("the address").trim());
        let id = self.id();
        self.ended = Some(self.client.begin("Wait", &id));
    }

    pub(crate) fn kill(&mut self, signal: u64) -> Answer {
        let request = self.id().number(3, signal);
        self.client.call("Kill", &request)
    }

    /// Waits for the end of the process.
    #[track_caller]
    pub(crate) fn wait(&mut self) -> u64 {
        let ended = self.ended.take().expect("the task was started");
        answer(&ended, "Wait").expect("an exit status").number(1)
    }

    /// Removes the task. Returns its output.
    pub(crate) fn remove(mut self) -> String {
        let id = self.id();
        self.client.ok("Delete", &id);
        // A shim that ends at once need not answer.
        let _ = self.client.begin("Shutdown", &id).recv();
        let [stdout, stderr] = self.output.map(|reader| reader.join().expect("a reader"));
        assert_eq!(stderr, "");
        stdout
    }

    /// The fields of the metrics.
    pub(crate) fn stats(&mut self) -> (String, Fields) {
        let id = self.id();
        let any = self.client.ok("Stats", &id).message(1).expect("metrics");
        (any.text(1), any.message(2).expect("metrics"))
    }

    pub(crate) fn update(&mut self, resources: &Value) {
        let request = self.id().any(2, "LinuxResources", resources);
        self.client.ok("Update", &request);
    }

    /// Runs a shell script with this input.
    #[track_caller]
    pub(crate) fn exec(&mut self, script: &str, input: &str) -> Outcome {
        let exec_id = "a-process";
        let dir = self.scope.dir().join(format!("{}-exec", self.container.id));
        fs::create_dir(&dir).expect("a directory for fifos");
        let stdin = dir.join("stdin");
        nix::unistd::mkfifo(&stdin, Mode::from_bits_truncate(0o700)).expect("a fifo");
        let output = ["stdout", "stderr"].map(|name| read(&dir.join(name)));
        let mut process = self.container.bundle.config["process"].clone();
        process["args"] = json!(["sh", "-c", script]);
        let named = self.id().text(2, exec_id);
        let fifo = |name: &str| dir.join(name).to_string_lossy().into_owned();
        let request = named.clone().text(4, &fifo("stdin")).text(5, &fifo("stdout"));
        let request = request.text(6, &fifo("stderr")).any(7, "Process", &process);
        self.client.ok("Exec", &request);
        self.client.ok("Start", &named);
        let ended = self.client.begin("Wait", &named);
        fs::OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&stdin)
            .and_then(|mut fifo| std::io::Write::write_all(&mut fifo, input.as_bytes()))
            .expect("the input");
        self.client.ok("CloseIO", &named.clone().number(3, 1));
        let status = answer(&ended, "Wait").expect("an exit status").number(1);
        self.client.ok("Delete", &named);
        let [stdout, stderr] = output.map(|reader| reader.join().expect("a reader"));
        assert_eq!(stderr, "", "{script}");
        fs::remove_dir_all(&dir).expect("the fifos");
        Outcome { status, stdout }
    }

    /// The output of a shell script that has to succeed.
    #[track_caller]
    pub(crate) fn shell(&mut self, script: &str) -> String {
        let outcome = self.exec(script, "");
        assert_eq!(outcome.status, 0, "{script}: {outcome:?}");
        outcome.stdout
    }
}

//! One container of a scope, and the runtime's verbs on it.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::bundle::{Bundle, PROBE_PATH, mount};
use crate::command::{Command, Output};
use crate::deadline::DEADLINE;
use crate::reader::Reader;
use crate::scope::{PodAddress, Scope};
use crate::subreaper::End;

/// The annotation by which engines mark a pod's first container (`sandbox`) and its members
/// (`container`).
pub(crate) const CONTAINER_TYPE: &str = "io.kubernetes.cri-o.ContainerType";

/// The id and the bundle of a container, which may not exist yet.
#[derive(Debug)]
pub struct Container<'a> {
    scope: &'a Scope,
    /// The container's id.
    pub id: String,
    /// The container's bundle.
    pub bundle: Bundle,
}

/// A container made by `create` or `run --detach`.
#[derive(Debug)]
pub struct Created<'a> {
    scope: &'a Scope,
    /// The pid in the pid file.
    pub pid: i32,
    /// The container's standard output.
    pub stdout: Reader,
    /// The container's standard error.
    pub stderr: Reader,
}

impl Created<'_> {
    /// Waits for the end of the process in the pid file.
    #[track_caller]
    pub fn wait(&self) -> End {
        self.scope
            .keeper()
            .wait(self.pid, DEADLINE)
            .unwrap_or_else(|| panic!("process {} still runs after {DEADLINE:?}", self.pid))
    }

    /// The end of the process in the pid file; `None` while it runs.
    pub fn ended(&self) -> Option<End> {
        self.scope.keeper().ended(self.pid)
    }
}

impl Scope {
    /// A new container with the default bundle; each call gives another id.
    pub fn container(&self) -> Container<'_> {
        let number = self.next_container();
        let id = format!("{}{number}", self.name());
        let bundle = Bundle::new(self.dir().join(format!("bundle-{number}")));
        let container = Container { scope: self, id, bundle };
        match self.pod() {
            Some(pod) => container.in_pod(pod),
            None => container,
        }
    }
}

impl<'a> Container<'a> {
    /// Sets the program to run.
    #[must_use]
    pub fn args<S: AsRef<str>>(self, args: impl IntoIterator<Item = S>) -> Self {
        let args: Vec<String> = args.into_iter().map(|a| a.as_ref().to_owned()).collect();
        self.edit(|c| c["process"]["args"] = json!(args))
    }

    /// Sets a shell script to run.
    #[must_use]
    pub fn shell(self, script: &str) -> Self {
        self.args(["sh", "-c", script])
    }

    /// Sets a sub-command of the probe to run.
    #[must_use]
    pub fn probe(self, args: &[&str]) -> Self {
        self.args([&[PROBE_PATH], args].concat())
    }

    /// Changes config.json.
    #[must_use]
    pub fn edit(mut self, change: impl FnOnce(&mut Value)) -> Self {
        change(&mut self.bundle.config);
        self
    }

    /// Gives the process these capabilities, in the bounding, permitted and effective sets.
    #[must_use]
    pub fn capabilities(self, names: &[&str]) -> Self {
        let sets = json!({ "bounding": names, "permitted": names, "effective": names });
        self.edit(|c| c["process"]["capabilities"] = sets)
    }

    /// Adds a mount.
    #[must_use]
    pub fn mount(self, destination: &str, kind: &str, source: &str, options: &[&str]) -> Self {
        let entry = mount(destination, kind, source, options);
        self.edit(|c| c["mounts"].as_array_mut().expect("mounts").push(entry))
    }

    /// Shares namespaces of the container whose process is `pid`. Each namespace has its name in
    /// config.json and its file in /proc/PID/ns.
    #[must_use]
    pub fn sharing(self, pid: i32, shared: &[(&str, &str)]) -> Self {
        self.edit(|c| {
            for namespace in c["linux"]["namespaces"].as_array_mut().expect("namespaces") {
                let kind = namespace["type"].as_str().expect("a type");
                if let Some((_, file)) = shared.iter().find(|(name, _)| *name == kind) {
                    namespace["path"] = json!(format!("/proc/{pid}/ns/{file}"));
                }
            }
        })
    }

    /// Makes the container a member of a pod.
    fn in_pod(self, pod: &PodAddress) -> Self {
        self.annotation(CONTAINER_TYPE, "container").sharing(pod.pid, &[("ipc", "ipc")])
    }

    /// Adds an annotation.
    #[must_use]
    pub fn annotation(self, name: &str, value: &str) -> Self {
        self.edit(|c| c["annotations"][name] = json!(value))
    }

    /// The path for `--pid-file`.
    pub fn pid_file(&self) -> PathBuf {
        self.bundle.dir.join("pid")
    }

    /// The runtime with a verb, its options, and this container's id.
    pub fn command(&self, verb: &str, options: &[&str]) -> Command<'a> {
        self.scope.runtime().args([verb]).args(options).args([&self.id])
    }

    /// The runtime with `run` or `create`. Writes the bundle first.
    pub fn command_with_bundle(&self, verb: &str, options: &[&str]) -> Command<'a> {
        self.bundle.write();
        let bundle = self.bundle.dir.to_string_lossy();
        self.command(verb, &[&["--bundle", &*bundle], options].concat())
    }

    /// Runs the container to its end.
    #[track_caller]
    pub fn run(&self) -> Output {
        self.command_with_bundle("run", &[]).output()
    }

    /// Runs the probe to its end and parses its JSON.
    #[track_caller]
    pub fn run_json(&self) -> Value {
        let out = self.run().ok();
        serde_json::from_str(&out.stdout).unwrap_or_else(|e| panic!("{e}: {out}"))
    }

    /// Creates the container.
    #[track_caller]
    pub fn create(&self) -> Created<'a> {
        self.detach("create", &[])
    }

    /// Creates and starts the container.
    #[track_caller]
    pub fn start_new(&self) -> Created<'a> {
        let mut created = self.create();
        let started = self.start();
        if started.status != 0 {
            panic!("{started}\nit said before: {}\n{}", created.stderr.so_far(), self.state());
        }
        created
    }

    /// Makes a container that stays: by `create` or `run --detach`.
    #[track_caller]
    pub fn detach(&self, verb: &str, options: &[&str]) -> Created<'a> {
        let pid_file = self.pid_file();
        let pid_option = ["--pid-file", &*pid_file.to_string_lossy()];
        let options = [&pid_option, options].concat();
        let mut job = self.command_with_bundle(verb, &options).spawn();
        let end = job.wait();
        if end != End::Exited(0) {
            let (out, err) = (job.stdout.so_far(), job.stderr.so_far());
            panic!("{verb} {end}\nstdout: {out}\nstderr: {err}");
        }
        self.scope.was_created(&self.id);
        let text = fs::read_to_string(&pid_file).expect("no pid file");
        let pid = text.parse().unwrap_or_else(|_| panic!("the pid file holds {text:?}"));
        Created { scope: self.scope, pid, stdout: job.stdout, stderr: job.stderr }
    }

    /// Starts the process of a created container.
    pub fn start(&self) -> Output {
        self.command("start", &[]).output()
    }

    /// The output of `state`.
    #[track_caller]
    pub fn state(&self) -> Value {
        let out = self.command("state", &[]).output().ok();
        serde_json::from_str(&out.stdout).unwrap_or_else(|e| panic!("{e}: {out}"))
    }

    /// The status in the output of `state`.
    #[track_caller]
    pub fn status(&self) -> String {
        self.state()["status"].as_str().expect("a status").to_owned()
    }

    /// Sends a signal to the container's first process.
    pub fn kill(&self, signal: &str) -> Output {
        self.command("kill", &[]).args([signal]).output()
    }

    /// Deletes the stopped container.
    pub fn delete(&self) -> Output {
        self.command("delete", &[]).output()
    }

    /// Deletes the container in any state.
    pub fn delete_force(&self) -> Output {
        self.command("delete", &["--force"]).output()
    }

    /// Runs a program in the container.
    pub fn exec<S: AsRef<str>>(&self, args: impl IntoIterator<Item = S>) -> Output {
        self.command("exec", &[]).args(args).output()
    }

    /// Runs a sub-command of the probe in the container and parses its JSON.
    #[track_caller]
    pub fn exec_json(&self, options: &[&str], probe_args: &[&str]) -> Value {
        let probe = [&[PROBE_PATH], probe_args].concat();
        let out = self.command("exec", options).args(probe).output().ok();
        serde_json::from_str(&out.stdout).unwrap_or_else(|e| panic!("{e}: {out}"))
    }
}

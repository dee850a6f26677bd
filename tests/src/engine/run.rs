//! One case with one runtime: the engine's verbs, and a record of their output.

use std::cell::{Cell, RefCell};
use std::fmt::Write as _;

use serde_json::Value;

use super::{Engine, IMAGE, Kind, With};
use crate::bundle::PROBE_PATH;
use crate::command::{Command, Output};

/// A case that runs with one of the runtimes.
#[derive(Debug)]
pub struct Run<'e> {
    /// The engine.
    pub engine: &'e Engine,
    /// The runtime of the case's containers.
    pub with: With,
    name: String,
    containers: Cell<u32>,
    said: RefCell<String>,
}

/// The name of a container that was made and not removed.
#[derive(Debug)]
pub struct Container<'r, 'e> {
    run: &'r Run<'e>,
    /// The container's name.
    pub name: String,
}

impl<'e> Run<'e> {
    pub(super) fn new(engine: &'e Engine, with: With, case: &str) -> Self {
        let name = format!("{}-{}", case.replace('_', "-"), with.name());
        Self { engine, with, name, containers: Cell::new(0), said: RefCell::default() }
    }

    /// Returns whether the runtime is Isopod, for the few differences of a microVM.
    pub fn isopod(&self) -> bool {
        self.with == With::Isopod
    }

    /// Returns whether the engine is Podman, for its few differences.
    pub fn podman(&self) -> bool {
        self.engine.kind == Kind::Podman
    }

    /// A name for an object of this case, such as a network.
    pub fn name(&self, of: &str) -> String {
        format!("{}-{of}", self.name)
    }

    /// All commands with their output.
    pub(super) fn said(&self) -> String {
        self.said.borrow().clone()
    }

    /// The engine's client.
    pub fn client(&self, args: &[&str]) -> Command<'e> {
        self.engine.client(self.with).args(args)
    }

    /// Runs a command to its end and records its output.
    #[track_caller]
    pub fn end(&self, command: Command<'_>) -> Output {
        let output = command.output();
        self.note(&output);
        output
    }

    /// Records the output of a command.
    pub fn note(&self, output: &Output) {
        let _ = writeln!(self.said.borrow_mut(), "{output}");
    }

    /// Runs a client's command to its end, with any exit status.
    #[track_caller]
    pub fn output(&self, args: &[&str]) -> Output {
        self.end(self.client(args))
    }

    /// The output of a client's command that has to succeed, without the last line's end.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        self.output(args).ok().stdout.trim_end().to_owned()
    }

    /// `run` or `create` with the case's runtime.
    pub fn command(&self, verb: &str, options: &[&str], command: &[&str]) -> Command<'e> {
        self.command_of(IMAGE, verb, options, command)
    }

    /// `run` or `create` with the case's runtime and another image. The container has no network
    /// unless an option asks for one; `--network=bridge` is the engines' default.
    pub fn command_of(
        &self,
        image: &str,
        verb: &str,
        options: &[&str],
        command: &[&str],
    ) -> Command<'e> {
        let mut client = self.client(&[verb]);
        client = match self.engine.kind {
            Kind::Docker => client.args(["--runtime", self.with.name()]),
            Kind::Podman => client.args([format!("--cgroup-parent={}", self.engine.cgroup())]),
            Kind::Containerd => panic!("containerd's client has another command line"),
        };
        // A network takes an emulated machine seconds, and has cases of its own.
        let alone = if options.iter().any(|option| brings_network(option)) {
            None
        } else {
            Some("--network=none")
        };
        client.args(alone).args(options).args([image]).args(command)
    }

    /// `run --rm` to its end, with any exit status.
    #[track_caller]
    pub fn run(&self, options: &[&str], command: &[&str]) -> Output {
        self.end(self.command("run", &[&["--rm"], options].concat(), command))
    }

    /// The output of a `run --rm` that has to succeed.
    #[track_caller]
    pub fn stdout(&self, options: &[&str], command: &[&str]) -> String {
        self.run(options, command).ok().stdout.trim_end().to_owned()
    }

    /// The output of a `run --rm` of a shell script that has to succeed.
    #[track_caller]
    pub fn shell(&self, options: &[&str], script: &str) -> String {
        self.stdout(options, &["sh", "-c", script])
    }

    /// The JSON of a `run --rm` of the probe.
    #[track_caller]
    pub fn probe(&self, options: &[&str], args: &[&str]) -> Value {
        parse(&self.run(options, &[&[PROBE_PATH], args].concat()).ok())
    }

    /// `run --detach`.
    #[track_caller]
    pub fn start(&self, options: &[&str], command: &[&str]) -> Container<'_, 'e> {
        self.make("run", &[&["--detach"], options].concat(), command)
    }

    /// `run --detach` of a shell script.
    #[track_caller]
    pub fn start_shell(&self, options: &[&str], script: &str) -> Container<'_, 'e> {
        self.start(options, &["sh", "-c", script])
    }

    /// `create`, or another verb that leaves a container.
    #[track_caller]
    pub fn make(&self, verb: &str, options: &[&str], command: &[&str]) -> Container<'_, 'e> {
        let container = self.named();
        let options = [&["--name", &container.name], options].concat();
        self.end(self.command(verb, &options, command)).ok();
        container
    }

    /// A name for a container that does not exist yet.
    pub fn named(&self) -> Container<'_, 'e> {
        let number = self.containers.get() + 1;
        self.containers.set(number);
        Container { run: self, name: self.name(&number.to_string()) }
    }

    /// Runs the engine's first container, which makes what an engine makes once.
    pub(super) fn first_container(&self) {
        match self.engine.kind {
            Kind::Docker | Kind::Podman => drop(self.run(&["--network=bridge"], &["true"])),
            Kind::Containerd => self.engine.first_task(self.with),
        }
    }

    /// The verb that removes containers in any state. `--time=0`: Podman would ask a container to
    /// end first, and give it ten seconds.
    fn removal(&self) -> &'static [&'static str] {
        if self.podman() { &["rm", "--force", "--time=0"] } else { &["rm", "--force"] }
    }

    /// Removes the containers that the case has left.
    pub(super) fn remove_containers(&self) {
        // A client's call takes an emulated machine a second, and most cases leave no container.
        if !self.engine.has_containers() {
            return;
        }
        let all = self.output(&["ps", "--all", "--quiet"]).ok().stdout;
        let ids: Vec<&str> = all.split_whitespace().collect();
        if !ids.is_empty() {
            let removed = self.output(&[self.removal(), &["--volumes"], &ids[..]].concat());
            if self.podman() && removed.status != 0 {
                // The infra container of a pod is removed only with the pod.
                self.ok(&["pod", "rm", "--all", "--force"]);
            } else {
                removed.ok();
            }
        }
    }
}

impl<'e> Container<'_, 'e> {
    /// The client with a verb and this container.
    pub fn command(&self, verb: &[&str], rest: &[&str]) -> Command<'e> {
        self.run.client(verb).args([&self.name]).args(rest)
    }

    /// The output of a verb on this container that has to succeed.
    #[track_caller]
    pub fn ok(&self, verb: &[&str]) -> String {
        self.run.end(self.command(verb, &[])).ok().stdout.trim_end().to_owned()
    }

    /// `exec`, with any exit status.
    #[track_caller]
    pub fn exec(&self, options: &[&str], command: &[&str]) -> Output {
        self.run.end(self.command(&[&["exec"], options].concat(), command))
    }

    /// The output of an `exec` of a shell script that has to succeed.
    #[track_caller]
    pub fn shell(&self, script: &str) -> String {
        self.exec(&[], &["sh", "-c", script]).ok().stdout.trim_end().to_owned()
    }

    /// The JSON of an `exec` of the probe.
    #[track_caller]
    pub fn probe(&self, options: &[&str], args: &[&str]) -> Value {
        parse(&self.exec(options, &[&[PROBE_PATH], args].concat()).ok())
    }

    /// A field of `inspect`, by a Go template.
    #[track_caller]
    pub fn inspect(&self, field: &str) -> String {
        self.ok(&["inspect", "--format", &format!("{{{{{field}}}}}")])
    }

    /// Waits for the container's end and returns its exit status.
    #[track_caller]
    pub fn wait(&self) -> i32 {
        let status = self.ok(&["wait"]);
        status.parse().unwrap_or_else(|_| panic!("`wait` prints {status:?}"))
    }

    /// The container's output, both streams.
    #[track_caller]
    pub fn logs(&self) -> Output {
        self.run.end(self.command(&["logs"], &[])).ok()
    }

    /// Follows the container's output up to a line with `text`.
    #[track_caller]
    pub fn await_log(&self, text: &str) {
        let mut job = self.command(&["logs", "--follow"], &[]).spawn();
        job.stdout.line_with(text);
        job.kill();
        job.wait();
    }

    /// `rm --force`.
    #[track_caller]
    pub fn remove(&self) {
        self.ok(self.run.removal());
    }
}

/// Returns whether an option of `run` is about networks.
fn brings_network(option: &str) -> bool {
    ["--network", "--publish", "--pod"].iter().any(|word| option.starts_with(word))
}

#[track_caller]
fn parse(output: &Output) -> Value {
    serde_json::from_str(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output}"))
}

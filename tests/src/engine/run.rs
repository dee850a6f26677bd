//! One case with one runtime: the engine's verbs, and a record of what was said.

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
    /// The runtime that its containers have.
    pub with: With,
    name: String,
    containers: Cell<u32>,
    said: RefCell<String>,
}

/// A container that was made and not removed: its name.
#[derive(Debug)]
pub struct Container<'r, 'e> {
    run: &'r Run<'e>,
    /// Its name.
    pub name: String,
}

impl<'e> Run<'e> {
    pub(super) fn new(engine: &'e Engine, with: With, case: &str) -> Self {
        let name = format!("{}-{}", case.replace('_', "-"), with.name());
        Self { engine, with, name, containers: Cell::new(0), said: RefCell::default() }
    }

    /// Whether the runtime is the one under test, for the few things in which a microVM differs.
    pub fn isopod(&self) -> bool {
        self.with == With::Isopod
    }

    /// Whether the engine is Podman, for the few things in which it differs.
    pub fn podman(&self) -> bool {
        self.engine.kind == Kind::Podman
    }

    /// A name for a thing of this case, such as a network.
    pub fn name(&self, of: &str) -> String {
        format!("{}-{of}", self.name)
    }

    /// All that was called, and what came of it.
    pub(super) fn said(&self) -> String {
        self.said.borrow().clone()
    }

    /// The engine's client.
    pub fn client(&self, args: &[&str]) -> Command<'e> {
        self.engine.client(self.with).args(args)
    }

    /// Runs a command to its end and keeps what it said.
    #[track_caller]
    pub fn end(&self, command: Command<'_>) -> Output {
        let output = command.output();
        self.note(&output);
        output
    }

    /// Keeps for the record what a command said.
    pub fn note(&self, output: &Output) {
        let _ = writeln!(self.said.borrow_mut(), "{output}");
    }

    /// A client's command to its end, whatever that is.
    #[track_caller]
    pub fn output(&self, args: &[&str]) -> Output {
        self.end(self.client(args))
    }

    /// A client's command that has to succeed; what it printed, without the last line's end.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        self.output(args).ok().stdout.trim_end().to_owned()
    }

    /// `run` or `create` with the case's runtime.
    pub fn command(&self, verb: &str, options: &[&str], command: &[&str]) -> Command<'e> {
        self.command_of(IMAGE, verb, options, command)
    }

    /// `run` or `create` with the case's runtime and another image. Without a network if no option asks for
    /// one; `--network=bridge` is what engines give when they are told nothing.
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
        };
        // A network takes an emulated machine seconds, and is what its own cases are about.
        let alone = if options.iter().any(|option| brings_network(option)) {
            None
        } else {
            Some("--network=none")
        };
        client.args(alone).args(options).args([image]).args(command)
    }

    /// `run --rm` to its end, whatever that is.
    #[track_caller]
    pub fn run(&self, options: &[&str], command: &[&str]) -> Output {
        self.end(self.command("run", &[&["--rm"], options].concat(), command))
    }

    /// `run --rm` that has to succeed; what it printed.
    #[track_caller]
    pub fn stdout(&self, options: &[&str], command: &[&str]) -> String {
        self.run(options, command).ok().stdout.trim_end().to_owned()
    }

    /// `run --rm` of a shell script that has to succeed; what it printed.
    #[track_caller]
    pub fn shell(&self, options: &[&str], script: &str) -> String {
        self.stdout(options, &["sh", "-c", script])
    }

    /// `run --rm` of the probe; the JSON that it prints.
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

    /// A name for a container that is not there yet.
    pub fn named(&self) -> Container<'_, 'e> {
        let number = self.containers.get() + 1;
        self.containers.set(number);
        Container { run: self, name: self.name(&number.to_string()) }
    }

    /// The verb that takes containers in any state. Podman would ask them to end first, and give them
    /// ten seconds.
    fn removal(&self) -> &'static [&'static str] {
        if self.podman() { &["rm", "--force", "--time=0"] } else { &["rm", "--force"] }
    }

    /// Removes what containers the case has left.
    pub(super) fn remove_containers(&self) {
        // Asking the client takes an emulated machine a second, and most cases leave none.
        if !self.engine.has_containers() {
            return;
        }
        let all = self.output(&["ps", "--all", "--quiet"]).ok().stdout;
        let ids: Vec<&str> = all.split_whitespace().collect();
        if !ids.is_empty() {
            let removed = self.output(&[self.removal(), &["--volumes"], &ids[..]].concat());
            if self.podman() && removed.status != 0 {
                // The container of a pod goes with it only.
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

    /// A verb on this container that has to succeed; what it printed.
    #[track_caller]
    pub fn ok(&self, verb: &[&str]) -> String {
        self.run.end(self.command(verb, &[])).ok().stdout.trim_end().to_owned()
    }

    /// `exec`, whatever comes of it.
    #[track_caller]
    pub fn exec(&self, options: &[&str], command: &[&str]) -> Output {
        self.run.end(self.command(&[&["exec"], options].concat(), command))
    }

    /// `exec` of a shell script that has to succeed; what it printed.
    #[track_caller]
    pub fn shell(&self, script: &str) -> String {
        self.exec(&[], &["sh", "-c", script]).ok().stdout.trim_end().to_owned()
    }

    /// `exec` of the probe; the JSON that it prints.
    #[track_caller]
    pub fn probe(&self, options: &[&str], args: &[&str]) -> Value {
        parse(&self.exec(options, &[&[PROBE_PATH], args].concat()).ok())
    }

    /// A field of `inspect`, by a Go template.
    #[track_caller]
    pub fn inspect(&self, field: &str) -> String {
        self.ok(&["inspect", "--format", &format!("{{{{{field}}}}}")])
    }

    /// Waits for its end: the exit status.
    #[track_caller]
    pub fn wait(&self) -> i32 {
        let status = self.ok(&["wait"]);
        status.parse().unwrap_or_else(|_| panic!("`wait` prints {status:?}"))
    }

    /// What it has written, both streams.
    #[track_caller]
    pub fn logs(&self) -> Output {
        self.run.end(self.command(&["logs"], &[])).ok()
    }

    /// Follows what it writes up to a line with `text`.
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

/// Whether an option of `run` says something of networks.
fn brings_network(option: &str) -> bool {
    ["--network", "--publish", "--pod"].iter().any(|word| option.starts_with(word))
}

#[track_caller]
fn parse(output: &Output) -> Value {
    serde_json::from_str(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output}"))
}

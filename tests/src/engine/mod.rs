//! Container engines under test: Docker, Podman and containerd, each with runc and with Isopod.
//!
//! An engine lives in namespaces of its own (`world.sh`), below a scope's subreaper. So it meets no
//! engine of the machine, and everything that the engine and its runtimes make can be counted. The
//! start takes an emulated machine twenty seconds, so an engine is started once for a test program.
//! The program is a table of [`Case`]s. Each runs with runc first, which proves the case, and then
//! with Isopod.

mod case;
pub mod cases;
mod containerd;
mod docker;
mod image;
mod podman;
mod remains;
mod run;
mod suite;

use std::cell::Cell;
use std::path::Path;

use crate::command::Command;
use crate::reader::Reader;
use crate::runtime::runtime;
use crate::scope::Scope;

pub use case::Case;
pub use containerd::{REPORTING, SANDBOXER};
pub use run::{Container, Run};
pub use suite::main;

/// The image of the cases: busybox, and the probe as `/bin/probe`.
pub const IMAGE: &str = "isopod-test";

const WORLD: &str = include_str!("world.sh");

/// The OCI runtime that an engine is told to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum With {
    /// runc, which proves the case.
    Runc,
    /// The runtime under test.
    Isopod,
}

impl With {
    /// The runtime's name, for people and for Docker.
    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Isopod => "isopod",
        }
    }

    /// The path of the runtime's program.
    pub fn path(self) -> String {
        match self {
            Self::Runc => "/usr/sbin/runc".to_owned(),
            Self::Isopod => runtime().path.to_string_lossy().into_owned(),
        }
    }
}

/// The Debian tree that a variable names; `cargo xtask test` makes the tree.
pub fn tree(variable: &str) -> String {
    match std::env::var(variable) {
        Ok(tree) if Path::new(&tree).is_dir() => tree,
        other => panic!("{variable} names no tree ({other:?}); run `cargo xtask test`"),
    }
}

/// The part of a path after the last `::`.
#[doc(hidden)]
pub const fn last_of(path: &str) -> &str {
    let bytes = path.as_bytes();
    let mut at = bytes.len();
    while at > 0 && bytes[at - 1] != b':' && bytes[at - 1] != b' ' {
        at -= 1;
    }
    path.split_at(at).1
}

/// The kind of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The machine's own Docker, or that of a tree.
    Docker,
    /// The machine's own Podman.
    Podman,
    /// The machine's own containerd, or that of a tree, with its plugin for Kubernetes.
    Containerd,
}

/// A running container engine.
#[derive(Debug)]
pub struct Engine {
    /// The engine's kind.
    pub kind: Kind,
    scope: Scope,
    /// The process that keeps the engine's namespaces.
    world: i32,
    _world_output: Reader,
    /// True for an engine of a Debian tree.
    of_tree: bool,
    /// The daemon of Docker or containerd.
    daemon: Cell<Option<i32>>,
}

impl Engine {
    /// Makes the world of an engine, without starting the engine.
    fn build(kind: Kind, tree: Option<&Path>) -> Self {
        let scope = Scope::new();
        let of_tree = tree.is_some();
        let dir = scope.dir().to_string_lossy().into_owned();
        let tree = tree.map(|tree| tree.to_string_lossy().into_owned()).unwrap_or_default();
        let programs = runtime().path.parent().unwrap_or(Path::new("/")).to_string_lossy();
        let job = scope
            .program(&["unshare", "--mount", "--net", "--propagation=private", "sh", "-c", WORLD])
            .args(["world", &dir, &tree, &programs])
            .spawn();
        let (world, mut output, mut errors) = (job.pid, job.stdout, job.stderr);
        let ready = output.line();
        assert_eq!(ready.as_deref(), Some("ready"), "no world: {}", errors.so_far());
        let mut engine =
            Self { kind, scope, world, _world_output: output, of_tree, daemon: Cell::default() };
        engine.make_cgroup();
        engine
    }

    /// Any program in the engine's world.
    pub fn inside(&self, argv: &[&str]) -> Command<'_> {
        let target = self.world.to_string();
        self.scope.program(&["nsenter", "--target", &target, "--mount", "--net", "--"]).args(argv)
    }

    /// A program of this machine in the engine's network namespace. The engine's tree may lack the
    /// program.
    pub fn on_network(&self, argv: &[&str]) -> Command<'_> {
        self.scope
            .program(&["nsenter", "--target", &self.world.to_string(), "--net", "--"])
            .args(argv)
    }

    /// The engine's client. Podman's is told the runtime before the verb.
    pub fn client(&self, with: With) -> Command<'_> {
        match self.kind {
            Kind::Docker => self.docker_client(),
            Kind::Podman => self.podman_client(with),
            Kind::Containerd => self.containerd_client(),
        }
    }

    /// A shell script that calls the client as a person with only one engine would.
    pub fn client_script(&self) -> String {
        match self.kind {
            Kind::Docker => self.docker_script(),
            Kind::Podman => self.podman_script(),
            Kind::Containerd => self.containerd_script(),
        }
    }

    /// The engine's directory, at the same path in its world.
    pub fn dir(&self) -> &Path {
        self.scope.dir()
    }

    /// The path of a file in the engine's directory, as text.
    pub fn path(&self, name: &str) -> String {
        self.dir().join(name).to_string_lossy().into_owned()
    }

    /// The parent of all containers' cgroups, from the root of the cgroup tree.
    pub fn cgroup(&self) -> String {
        format!("/isopod-{}", self.scope.name())
    }

    /// Returns whether the engine keeps a container, by the directories of containers.
    fn has_containers(&self) -> bool {
        let dir = match self.kind {
            Kind::Docker => "docker/containers",
            Kind::Podman => "storage/overlay-containers",
            // The cases remove their own.
            Kind::Containerd => return false,
        };
        let path = self.dir().join(dir);
        let entries =
            std::fs::read_dir(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let is_dir = |entry: &std::fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
        entries.flatten().any(|entry| is_dir(&entry))
    }

    fn make_cgroup(&mut self) {
        let path = format!("/sys/fs/cgroup{}", self.cgroup());
        // Without a tree of cgroup v2 alone, the engine makes the cgroups itself.
        if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
            std::fs::create_dir(&path).unwrap_or_else(|e| panic!("cannot make {path}: {e}"));
        }
    }

    /// Ends the engine. Fails if the engine or a runtime has left anything behind.
    pub fn end(self) {
        if let Some(daemon) = self.daemon.take() {
            self.end_daemon(daemon);
        }
        let path = format!("/sys/fs/cgroup{}", self.cgroup());
        remains::remove_empty_cgroups(Path::new(&path));
        self.scope.keeper().signal(self.world, libc::SIGKILL).expect("the world's keeper");
        self.scope.keeper().wait(self.world, crate::DEADLINE).expect("the world's end");
        // The scope counts all remains when it is dropped.
    }
}

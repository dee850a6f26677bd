//! The directories, containers and processes of one test.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::census::{Census, View, children_of};
use crate::command::Command;
use crate::deadline::DEADLINE;
use crate::runtime::runtime;
use crate::subreaper::Subreaper;
use crate::turn::Turn;

static NEXT: AtomicU32 = AtomicU32::new(1);

/// The world of one test. Dropping the scope deletes the created containers and fails the test if
/// anything is left. A container that `run` ended, or that `create` failed to make, may leave
/// nothing even before that.
#[derive(Debug)]
pub struct Scope {
    /// Part of the path of everything in the scope.
    name: String,
    dir: PathBuf,
    subreaper: Subreaper,
    before: Census,
    /// Containers that exist until they are deleted.
    created: Mutex<BTreeSet<String>>,
    containers: AtomicU32,
    /// `None` for the scope of the pod, which may exist beside any other.
    turn: Option<Turn>,
    /// The pod of the scope's containers; `None` when each has a microVM of its own.
    pod: Option<PodAddress>,
}

/// The first container of the pod, as its members name it.
#[derive(Debug, Clone)]
pub(crate) struct PodAddress {
    /// The `--root` of the pod's containers.
    pub(crate) root: PathBuf,
    /// The pid of the first container's process.
    pub(crate) pid: i32,
}

impl Scope {
    /// A scope beside those of other tests. Counts items with its name, and its processes.
    pub fn new() -> Self {
        Self::build(Some(Turn::beside_others()), None)
    }

    /// A scope that waits until no other scope of the program exists, and counts on the whole
    /// machine.
    pub fn alone() -> Self {
        Self::build(Some(Turn::alone()), None)
    }

    pub(crate) fn build(turn: Option<Turn>, pod: Option<PodAddress>) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // The last character is no digit, so the name is no part of another scope's name.
        let name = format!("it{}x{number}_", std::process::id());
        let base = std::env::var_os("ISOPOD_TEST_DIR").map_or_else(std::env::temp_dir, Into::into);
        let dir = std::path::absolute(base).expect("a directory for tests").join(&name);
        fs::create_dir_all(dir.join("state")).expect("cannot make the scope's directory");
        let subreaper = Subreaper::new(&runtime().probe, &dir);
        let mut scope = Self {
            name,
            dir,
            subreaper,
            before: Census::default(),
            created: Mutex::default(),
            containers: AtomicU32::new(1),
            turn,
            pod,
        };
        scope.before = scope.census();
        scope
    }

    /// The number of the next container.
    pub(crate) fn next_container(&self) -> u32 {
        self.containers.fetch_add(1, Ordering::Relaxed)
    }

    /// The pod of the scope's containers; `None` when each has a microVM of its own.
    pub(crate) fn pod(&self) -> Option<&PodAddress> {
        self.pod.as_ref()
    }

    /// The runtime with this scope's `--root`.
    pub fn runtime(&self) -> Command<'_> {
        let path = runtime().path.to_string_lossy();
        // Long enough for a boot on an emulated machine under load.
        self.program(&[&*path, "--root", &*self.root().to_string_lossy()])
            .env("ISOPOD_BOOT_TIMEOUT", "120")
    }

    /// Any program.
    pub fn program(&self, argv: &[&str]) -> Command<'_> {
        Command::new(&self.subreaper, argv.iter().map(|&a| a.to_owned()).collect())
    }

    /// The runtime's `--root`.
    pub fn root(&self) -> PathBuf {
        self.pod.as_ref().map_or_else(|| self.dir.join("state"), |pod| pod.root.clone())
    }

    /// The scope's own directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A string that is part of no name outside the scope.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The subreaper of the scope's processes.
    pub fn keeper(&self) -> &Subreaper {
        &self.subreaper
    }

    /// The only child of process `pid` whose program has this name.
    #[track_caller]
    pub fn child(&self, pid: i32, name: &str) -> i32 {
        let children = children_of(pid);
        let named: Vec<i32> =
            children.iter().filter(|(_, n)| n == name).map(|&(child, _)| child).collect();
        let [child] = named[..] else { panic!("children of {pid}, for {name}: {children:?}") };
        child
    }

    /// The items of the scope at this moment.
    pub fn census(&self) -> Census {
        Census::take(&View {
            name: &self.name,
            dir: &self.dir,
            root: &self.root(),
            subreaper: self.subreaper.pid(),
            all: self.turn.as_ref().is_some_and(Turn::is_alone),
        })
    }

    /// Fails the test if an item has come or gone since the scope began.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        let left = self.census().since(&self.before);
        assert!(left.is_empty(), "left behind:\n{}", left.join("\n"));
    }

    /// Does the same as [`Self::assert_nothing_left`], except for items that begin with one of
    /// `kinds`.
    #[track_caller]
    pub fn assert_nothing_left_but(&self, kinds: &[&str]) {
        let mut left = self.census().since(&self.before);
        left.retain(|item| !kinds.iter().any(|kind| item[2..].starts_with(kind)));
        assert!(left.is_empty(), "left behind:\n{}", left.join("\n"));
    }

    /// Waits until no process of the scope is left. Fails the test when one stays.
    #[track_caller]
    pub fn wait_for_processes(&self) {
        // A process leaves the census when the subreaper collects the process or its parent. The
        // subreaper reports each of these, so looking again after each report is enough.
        let gone = || {
            let since = self.census().since(&self.before);
            !since.iter().any(|item| item.starts_with("+ process "))
        };
        let all_gone = self.subreaper.wait_until(DEADLINE, gone);
        assert!(all_gone, "left behind:\n{}", self.census().since(&self.before).join("\n"));
    }

    /// Notes that the container exists: the scope's end deletes it unless the test does.
    pub(crate) fn was_created(&self, id: &str) {
        self.created.lock().expect("no test panics with it").insert(id.to_owned());
    }

    pub(crate) fn delete_created(&self) {
        let created = self.created.lock().map(|mut ids| std::mem::take(&mut *ids));
        self.delete(created.unwrap_or_default());
    }

    /// Deletes every container in the state directory, expected or not. In the pod's directory,
    /// only the scope's own ones.
    fn delete_all(&self) {
        let entries = fs::read_dir(self.root()).into_iter().flatten().flatten();
        let ids = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        self.delete(ids.filter(|id| self.pod.is_none() || id.starts_with(&self.name)));
    }

    fn delete(&self, ids: impl IntoIterator<Item = String>) {
        for id in ids {
            if self.root().join(&id).exists() {
                // The census shows a failure.
                self.runtime().args(["delete", "--force", &id]).output();
            }
        }
    }
}

impl Default for Scope {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The test has failed already. Tidy up only, and let no panic hide the first one.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.delete_all()));
            eprintln!("the failed test's directory was {}", self.dir.display());
            let _ = fs::remove_dir_all(&self.dir);
            return;
        }
        self.delete_created();
        let left = self.census().since(&self.before);
        if !left.is_empty() {
            self.delete_all();
        }
        let _ = fs::remove_dir_all(&self.dir);
        assert!(left.is_empty(), "left behind:\n{}", left.join("\n"));
    }
}

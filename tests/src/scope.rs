//! What one test may touch: its directories, its containers and all processes that come of them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::bundle::Bundle;
use crate::census::{Census, View, children_of};
use crate::command::{Command, DEADLINE};
use crate::container::Container;
use crate::keeper::Keeper;
use crate::pod;
use crate::runtime::runtime;
use crate::turn::Turn;

static NEXT: AtomicU32 = AtomicU32::new(1);

/// The world of one test. Dropping it deletes the containers that were created, and counts what is
/// left: of one that was run, or could not be created, nothing may be there even before that.
#[derive(Debug)]
pub struct Scope {
    /// In the path of everything that belongs to the scope.
    name: String,
    dir: PathBuf,
    keeper: Keeper,
    before: Census,
    /// Containers that are there until they are deleted.
    created: Mutex<BTreeSet<String>>,
    containers: AtomicU32,
    /// None for that of the pod, which is there beside any.
    turn: Option<Turn>,
    /// Where its containers live, if not in microVMs of their own.
    pod: Option<pod::Address>,
}

impl Scope {
    /// A scope beside those of other tests: counts what bears its name or comes of its processes.
    pub fn new() -> Self {
        Self::build(Some(Turn::beside_others()), None)
    }

    /// As [`Self::new`], but its containers live in the pod that the tests of this program share, as long as
    /// their configurations say nothing else. For tests that are about a container, not about a microVM.
    pub fn in_pod() -> Self {
        let turn = Turn::beside_others();
        Self::build(Some(turn), pod::address())
    }

    /// The pod's own scope. It has no turn: to the scopes that come and go, the pod is part of the machine.
    pub(crate) fn of_pod() -> Self {
        Self::build(None, None)
    }

    /// A scope that waits until no other one of the program exists, and counts on the whole machine.
    pub fn alone() -> Self {
        Self::build(Some(Turn::alone()), None)
    }

    fn build(turn: Option<Turn>, pod: Option<pod::Address>) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // Ends with what no number begins with, so that it is in no other scope's name.
        let name = format!("it{}x{number}_", std::process::id());
        let base = std::env::var_os("ISOPOD_TEST_DIR").map_or_else(std::env::temp_dir, Into::into);
        let dir = std::path::absolute(base).expect("a directory for tests").join(&name);
        fs::create_dir_all(dir.join("state")).expect("cannot make the scope's directory");
        let keeper = Keeper::new(&runtime().probe, &dir);
        let mut scope = Self {
            name,
            dir,
            keeper,
            before: Census::default(),
            created: Mutex::default(),
            containers: AtomicU32::new(1),
            turn,
            pod,
        };
        scope.before = scope.census();
        scope
    }

    /// A new container with the default bundle; every call another id.
    pub fn container(&self) -> Container<'_> {
        let number = self.containers.fetch_add(1, Ordering::Relaxed);
        let id = format!("{}{number}", self.name);
        let bundle = Bundle::new(self.dir.join(format!("bundle-{number}")));
        let container = Container::new(self, id, bundle);
        match &self.pod {
            Some(pod) => pod.admit(container),
            None => container,
        }
    }

    /// The runtime with this scope's `--root`.
    pub fn runtime(&self) -> Command<'_> {
        let path = runtime().path.to_string_lossy();
        // Long enough for a boot on an emulated machine that has other things to do.
        self.program(&[&*path, "--root", &*self.root().to_string_lossy()])
            .env("ISOPOD_BOOT_TIMEOUT", "120")
    }

    /// Any program.
    pub fn program(&self, argv: &[&str]) -> Command<'_> {
        Command::new(&self.keeper, argv.iter().map(|&a| a.to_owned()).collect())
    }

    /// The runtime's `--root`.
    pub fn root(&self) -> PathBuf {
        self.pod.as_ref().map_or_else(|| self.dir.join("state"), |pod| pod.root.clone())
    }

    /// The scope's own directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A name that nothing outside the scope has in its own.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The parent of the scope's processes.
    pub fn keeper(&self) -> &Keeper {
        &self.keeper
    }

    /// The one child of process `pid` whose program bears this name.
    #[track_caller]
    pub fn child(&self, pid: i32, name: &str) -> i32 {
        let children = children_of(pid);
        let named: Vec<i32> =
            children.iter().filter(|(_, n)| n == name).map(|&(child, _)| child).collect();
        let [child] = named[..] else { panic!("children of {pid}, for {name}: {children:?}") };
        child
    }

    /// What there is now.
    pub fn census(&self) -> Census {
        Census::take(&View {
            name: &self.name,
            dir: &self.dir,
            root: &self.root(),
            keeper: self.keeper.pid(),
            all: self.turn.as_ref().is_some_and(Turn::is_alone),
        })
    }

    /// Fails the test if anything is there that was not when the scope began.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        let left = self.census().since(&self.before);
        assert!(left.is_empty(), "left behind:\n{}", left.join("\n"));
    }

    /// As [`Self::assert_nothing_left`], but for what begins with one of these words.
    #[track_caller]
    pub fn assert_nothing_left_but(&self, kinds: &[&str]) {
        let mut left = self.census().since(&self.before);
        left.retain(|item| !kinds.iter().any(|kind| item[2..].starts_with(kind)));
        assert!(left.is_empty(), "left behind:\n{}", left.join("\n"));
    }

    /// Waits until no process is left that the scope has brought. Fails the test when one stays.
    #[track_caller]
    pub fn wait_for_processes(&self) {
        // Whatever ends leaves the keeper's descendants when the keeper has collected it or its
        // parent, so it is enough to look again after each of these.
        let gone = || {
            let since = self.census().since(&self.before);
            !since.iter().any(|item| item.starts_with("+ process "))
        };
        let all_gone = self.keeper.wait_until(DEADLINE, gone);
        assert!(all_gone, "left behind:\n{}", self.census().since(&self.before).join("\n"));
    }

    /// The container is there now, and is to be deleted at the end, should the test not do so.
    pub(crate) fn was_created(&self, id: &str) {
        self.created.lock().expect("no test panics with it").insert(id.to_owned());
    }

    pub(crate) fn delete_created(&self) {
        let created = self.created.lock().map(|mut ids| std::mem::take(&mut *ids));
        self.delete(created.unwrap_or_default());
    }

    /// Deletes what the state directory shows, whether it should be there or not.
    fn delete_all(&self) {
        let entries = fs::read_dir(self.root()).into_iter().flatten().flatten();
        let ids = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        self.delete(ids.filter(|id| self.pod.is_none() || id.starts_with(&self.name)));
    }

    fn delete(&self, ids: impl IntoIterator<Item = String>) {
        for id in ids {
            if self.root().join(&id).exists() {
                // Whether it has worked, the census tells.
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
            // The test has its failure; only tidy up, and let nothing of that hide it.
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

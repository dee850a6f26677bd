//! The pod that tests of one program share: a microVM that is booted once, in which their containers live
//! one after the other, each with namespaces of its own but for that of ipc.
//!
//! For tests of what a container is, and not of its microVM. It is a test of a microVM's long life too:
//! dozens of containers come and go in each. With another runtime under test there is none, and the
//! containers are as any others.

use std::sync::Mutex;

use crate::container::Container;
use crate::runtime::runtime;
use crate::scope::Scope;

/// By which engines say what a container is to its pod.
const TYPE: &str = "io.kubernetes.cri-o.ContainerType";

static POD: Mutex<Option<Pod>> = Mutex::new(None);

/// The pod's own world, and its first container's process.
struct Pod {
    scope: Scope,
    pid: i32,
}

/// Where the pod's first container is, as its members have to know.
#[derive(Debug, Clone)]
pub(crate) struct Address {
    /// The `--root` that they share.
    pub(crate) root: std::path::PathBuf,
    pid: i32,
}

/// The program's pod, which is there from the first call to the program's end. None for a runtime that
/// has none.
pub(crate) fn address() -> Option<Address> {
    if !runtime().is_isopod() {
        return None;
    }
    let mut pod = POD.lock().unwrap_or_else(|e| e.into_inner());
    // A test that has lost it must not fail those that follow.
    if pod.as_ref().is_some_and(|pod| pod.scope.keeper().ended(pod.pid).is_some()) {
        drop(pod.take());
    }
    let pod = pod.get_or_insert_with(Pod::new);
    Some(Address { root: pod.scope.root(), pid: pod.pid })
}

impl Pod {
    fn new() -> Self {
        let scope = Scope::of_pod();
        let container = scope.container().annotation(TYPE, "sandbox").args(["sleep", "100000"]);
        let pid = container.start_new().pid;
        // SAFETY: `end` is a function of this program that takes nothing and returns; exit(3) calls it
        // once, before what it uses is gone.
        let registered = unsafe { libc::atexit(end) };
        assert_eq!(registered, 0, "cannot register the pod's end");
        Self { scope, pid }
    }
}

/// Deletes the pod and counts what is left of it.
extern "C" fn end() {
    let pod = POD.lock().unwrap_or_else(|e| e.into_inner()).take();
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(pod)));
    if ended.is_err() {
        // The test runner has told its result already.
        eprintln!("the tests' pod: not ended as it should be");
        // SAFETY: ends this process without further ado, from the thread that is ending it anyway.
        unsafe { libc::_exit(101) }
    }
}

impl Address {
    /// Makes a container a member of the pod.
    pub(crate) fn admit<'a>(&self, container: Container<'a>) -> Container<'a> {
        container.annotation(TYPE, "container").sharing(self.pid, &[("ipc", "ipc")])
    }
}

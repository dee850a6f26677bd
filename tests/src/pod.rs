//! The pod that the tests of one program share.
//!
//! The pod is a microVM that is booted once. The containers of the tests live in it one after the
//! other. Each has namespaces of its own, except for the IPC namespace.
//!
//! The pod is for tests of the container, not of its microVM. It tests a microVM's long life too:
//! dozens of containers come and go in each. With another runtime under test there is no pod, and
//! the containers are ordinary ones.

use std::sync::Mutex;

use crate::container::CONTAINER_TYPE;
use crate::runtime::runtime;
use crate::scope::{PodAddress, Scope};
use crate::turn::Turn;

static POD: Mutex<Option<Pod>> = Mutex::new(None);

/// The pod's own scope, and its first container's process.
struct Pod {
    scope: Scope,
    pid: i32,
}

impl Scope {
    /// Makes a scope like that of [`Self::new`], with the program's pod for its containers, unless
    /// their configurations say otherwise. For tests of a container, not of its microVM.
    pub fn in_pod() -> Self {
        let turn = Turn::beside_others();
        Self::build(Some(turn), address())
    }
}

/// The program's pod, from the first call to the program's end. `None` for a runtime without
/// microVMs.
fn address() -> Option<PodAddress> {
    if !runtime().is_isopod() {
        return None;
    }
    let mut pod = POD.lock().unwrap_or_else(|e| e.into_inner());
    // A test that has lost the pod must not fail later tests.
    if pod.as_ref().is_some_and(|pod| pod.scope.keeper().ended(pod.pid).is_some()) {
        drop(pod.take());
    }
    let pod = pod.get_or_insert_with(Pod::new);
    Some(PodAddress { root: pod.scope.root(), pid: pod.pid })
}

impl Pod {
    fn new() -> Self {
        // No turn: to scopes that come and go, the pod is part of the machine.
        let scope = Scope::build(None, None);
        let container =
            scope.container().annotation(CONTAINER_TYPE, "sandbox").args(["sleep", "100000"]);
        let pid = container.start_new().pid;
        // SAFETY: `end` is a function of this program that takes nothing and returns. exit(3) calls
        // it once, while everything that it uses still exists.
        let registered = unsafe { libc::atexit(end) };
        assert_eq!(registered, 0, "cannot register the pod's end");
        Self { scope, pid }
    }
}

/// Deletes the pod and counts its remains.
extern "C" fn end() {
    let pod = POD.lock().unwrap_or_else(|e| e.into_inner()).take();
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(pod)));
    if ended.is_err() {
        // The test runner has printed its result already.
        eprintln!("the tests' pod: not ended as it should be");
        // SAFETY: ends this process at once, from the thread that is ending it anyway.
        unsafe { libc::_exit(101) }
    }
}

//! The engine: sandboxes, their containers, and the processes in these.
//!
//! ```text
//!  front end ── Sandbox::boot ──► microVM: VMM process, share, network
//!      │              │
//!      │              └─ create ──► Container ── requests ──► the task that owns it (lifecycle)
//!      │                               │                        │ pause, update (updates)
//!      │                               └─ exec ──► Exec         │ start (starting), hooks
//!      └── Io: where the streams of a process go                └ record on disk
//! ```
//!
//! A [`Sandbox`] belongs to the event loop of one thread. That thread is in the sandbox's mount and
//! network namespaces, and the VMM ends with it. All work is done there. The handles [`Sandbox`],
//! [`Container`] and [`Exec`] may be used on any thread, and what may block has threads of its own:
//! so no container waits for another.
//!
//! The microVM ends with the first container of a sandbox, and all others with it. The engine never
//! moves the process that it runs in: its cgroup and its `oom_score_adj` are the front end's.

mod container;
mod exec;
mod hook_process;
pub(crate) mod hooks;
mod lifecycle;
mod microvm;
mod place;
mod process_info;
mod record;
mod request;
mod runtime_namespace;
mod sandbox;
mod starting;
pub(crate) mod stdio;
mod updates;

use std::time::Duration;

use oci_spec::runtime::Hooks;

use self::lifecycle::START_TIMEOUT;
pub(crate) use self::lifecycle::lost_with;
pub(crate) use self::{
    container::{Container, NewContainer},
    exec::{Exec, ExecControl, ExecSpec},
    place::Place,
    process_info::ProcessInfo,
    record::{OciState, Pod, Record, Remains, records},
    request::{Ended, Request},
    runtime_namespace::{RuntimeNamespace, RuntimeNamespacePlan},
    sandbox::{NewSandbox, Sandbox},
    stdio::{Io, IoPlan},
};

/// Longest time until a start has been carried out; `None` if there are hooks without a timeout.
pub(crate) fn start_limit(hooks: Option<&Hooks>) -> Option<Duration> {
    let hooks = hooks.map_or(Some(Duration::ZERO), |hooks| {
        let both = [hooks.start_container(), hooks.poststart()];
        both.into_iter().flatten().try_fold(Duration::ZERO, |sum, hooks| {
            Some(sum.saturating_add(hooks::time_limit(hooks)?))
        })
    });
    hooks?.checked_add(START_TIMEOUT)
}

//! The sandbox process: the host side of one microVM and its container.
//!
//! ```text
//!  isopod create/run ── launch socket ──► sandbox process ── control socket ──► isopod-vmm
//!  isopod start/kill/delete ─ control.sock ─┘   │  └── stdio relay threads           │
//!                                                └── ttrpc, streams ── vsock.sock ────┘
//! ```
//!
//! `create` and `run` start the sandbox process by executing `isopod` again, with a [`launch`]
//! document. Its `main` is in [`create`]. It enters a mount namespace of its own, builds the share
//! (`microvm::share`) and starts the VMM (`microvm::vmm`). It waits for the agent (`microvm::boot`)
//! and has the agent build the container.
//!
//! From then on one task owns the container's state ([`lifecycle`]). The sandbox process exits with
//! the container's exit status, because callers of runc wait for that status. `exec` has a process
//! of its own for each program ([`exec`]). A container of a pod has no VMM of its own: it lives in
//! the microVM of the pod's first container ([`pod`]).

pub mod create;
pub mod exec;
mod guest_process;
pub(crate) mod hooks;
pub mod launch;
mod lifecycle;
mod microvm;
pub mod pod;
pub mod query;
pub mod record;
mod starting;
pub mod stdio;
mod updates;

use std::time::Duration;

use oci_spec::runtime::Hooks;

use self::lifecycle::START_TIMEOUT;
use crate::control::ANSWER_TIMEOUT;

/// Longest time until a start is answered; `None` if there are hooks without a timeout.
pub fn start_limit(hooks: Option<&Hooks>) -> Option<Duration> {
    let hooks = hooks.map_or(Some(Duration::ZERO), |hooks| {
        let both = [hooks.start_container(), hooks.poststart()];
        both.into_iter().flatten().try_fold(Duration::ZERO, |sum, hooks| {
            Some(sum.saturating_add(hooks::time_limit(hooks)?))
        })
    });
    hooks?.checked_add(START_TIMEOUT + ANSWER_TIMEOUT)
}

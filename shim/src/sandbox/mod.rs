//! The sandbox process: the host side of one microVM and its container.
//!
//! ```text
//!  isopod create/run ── launch socket ──► sandbox process ── control socket ──► isopod-vmm
//!  isopod start/kill/delete ─ control.sock ─┘   │  └── stdio relay threads           │
//!                                                └── ttrpc, streams ── vsock.sock ────┘
//! ```
//!
//! `create` and `run` start it by executing `isopod` again ([`launch`]). It enters a mount
//! namespace of its own, builds the shared directory ([`share`]), starts the VMM ([`vmm`]), waits
//! for the agent ([`boot`]) and has it build the container. From then on one task owns the
//! container's state ([`lifecycle`]). It exits with the container's exit status, which is what
//! runc's callers wait for. `exec` has a process of its own for each program ([`exec`]). A container of
//! a pod has no VMM of its own: it lives in the microVM of the pod's first container ([`pod`]).

mod agent;
mod boot;
mod change;
pub(crate) mod console;
pub mod control;
mod ending;
pub mod exec;
mod forgetting;
mod guest_clock;
pub(crate) mod hooks;
mod id_map;
pub mod inspect;
pub mod launch;
mod lifecycle;
mod limits;
mod machine;
mod oom;
pub mod pod;
pub mod preserved;
pub mod process;
mod ready;
mod resolver;
mod server;
mod share;
pub mod signals;
mod starting;
pub mod stdio;
pub mod timeline;
mod view;
mod vmm;
pub mod vsock;

use std::{os::fd::OwnedFd, time::Duration};

use oci_spec::runtime::Hooks;
use tokio::io::unix::AsyncFd;

use isopod_vmm::text::is_showable;

use crate::error::{Explain, Result};

/// Longest that a start may take until it is answered. None if it has hooks without a timeout.
pub fn start_limit(hooks: Option<&Hooks>) -> Option<Duration> {
    let hooks = hooks.map_or(Some(Duration::ZERO), |hooks| {
        let both = [hooks.start_container(), hooks.poststart()];
        both.into_iter().flatten().try_fold(Duration::ZERO, |sum, hooks| {
            Some(sum.saturating_add(hooks::time_limit(hooks)?))
        })
    });
    hooks?.checked_add(lifecycle::START_TIMEOUT + control::ANSWER_TIMEOUT)
}

/// Eight bytes of the kernel's random pool.
///
/// # Errors
///
/// If the kernel has none.
pub fn random_u64() -> Result<u64> {
    let mut bytes = [0; 8];
    random(&mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}

/// Fills `bytes` from the kernel's random pool.
fn random(bytes: &mut [u8]) -> Result<()> {
    let mut filled = 0;
    while filled < bytes.len() {
        filled +=
            rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())
                .explain(|| "cannot get random numbers from the kernel".into())?;
    }
    Ok(())
}

/// Text from the guest, made safe to show: one line, no control or format characters, bounded.
pub(crate) fn printable(text: &str) -> String {
    const MAX_CHARS: usize = 1024;
    let mut shown: String =
        text.chars().take(MAX_CHARS).map(|c| if is_showable(c) { c } else { ' ' }).collect();
    if text.chars().nth(MAX_CHARS).is_some() {
        shown.push_str("...");
    }
    shown
}

/// A descriptor that tasks can wait for.
fn wait_for(fd: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned by what is returned and is never given out but by reference,
    // so it stays open, and the same file, as long as it is registered.
    unsafe { AsyncFd::register(fd) }.map_err(Into::into)
}

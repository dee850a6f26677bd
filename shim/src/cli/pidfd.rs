//! `--pidfd-socket`: the process that a pid file names, as a descriptor that never becomes another's.

use std::path::Path;

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::{
    error::{Error, Explain, Result},
    sandbox::console,
};

/// The message that the descriptor comes with, as runc has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Of {
    /// A container.
    Container,
    /// A further process in one.
    Exec,
}

/// Sends a pidfd of a process that has not been waited for to whoever listens at `socket`.
///
/// # Errors
///
/// If nobody listens there.
pub(super) fn send(socket: &Path, pid: u32, of: Of) -> Result<()> {
    let what = || format!("cannot send the process to {} (--pidfd-socket)", socket.display());
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| Error::new("a process has no pid"))?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).explain(what)?;
    let message = match of {
        Of::Container => "standard",
        Of::Exec => "setns",
    };
    console::send(socket, &pidfd, message.as_bytes()).explain(what)
}

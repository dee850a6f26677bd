//! `--pidfd-socket`: sends the process that a pid file names, as a descriptor that never refers to
//! another process.

use std::path::Path;

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::{
    console_socket,
    error::{Error, Explain, Result},
};

/// The kind of a process. It decides the message that comes with the descriptor, as in runc.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Of {
    /// A container.
    Container,
    /// A further process in a container.
    Exec,
}

/// Sends a pidfd of a process to the listener at `socket`. The process has not been waited for, so
/// its pid is still its own.
pub(super) fn send(socket: &Path, pid: u32, of: Of) -> Result<()> {
    let what = || format!("cannot send the process to {} (--pidfd-socket)", socket.display());
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| Error::new("cannot send a pidfd: the pid is out of range"))?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).explain(what)?;
    let message = match of {
        Of::Container => "standard",
        Of::Exec => "setns",
    };
    console_socket::send(socket, &pidfd, message.as_bytes()).explain(what)
}

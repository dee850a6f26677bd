//! The standard streams of a process: pipes between it and the host's connections.

use std::os::fd::OwnedFd;

use rustix::fs::OFlags;
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::Interest;

use super::path;
use crate::error::{Context as _, Result};
use crate::pump::{self, Endpoint};
use crate::reaper::ExitReceiver;
use crate::stream::Connection;

/// The host's connections for one process.
pub(crate) struct Connections {
    pub(crate) stdin: Option<Connection>,
    pub(crate) stdout: Option<Connection>,
    pub(crate) stderr: Option<Connection>,
}

/// The agent's ends of a process's pipes; those that the host has not connected are /dev/null.
#[derive(Default)]
pub(crate) struct Pipes {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

impl Pipes {
    /// Makes the pipes that the connections need, and returns the process's ends as its standard
    /// input, output and error.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn make(connections: &Connections) -> Result<(Self, Vec<OwnedFd>)> {
        let (input, stdin) = match &connections.stdin {
            Some(_) => {
                let (read, write) = pipe()?;
                (read, Some(write))
            }
            None => (null()?, None),
        };
        let (output, stdout) = Self::output(connections.stdout.is_some())?;
        let (error, stderr) = Self::output(connections.stderr.is_some())?;
        Ok((Self { stdin, stdout, stderr }, vec![input, output, error]))
    }

    fn output(connected: bool) -> Result<(OwnedFd, Option<OwnedFd>)> {
        if !connected {
            return Ok((null()?, None));
        }
        let (read, write) = pipe()?;
        Ok((write, Some(read)))
    }

    /// Starts moving bytes.
    ///
    /// # Errors
    ///
    /// A descriptor cannot be registered with the runtime.
    pub(crate) fn connect(self, connections: Connections, exit: &ExitReceiver) -> Result<()> {
        if let (Some(fd), Some(connection)) = (self.stdin, connections.stdin) {
            let sink = endpoint(fd, Interest::WRITABLE | Interest::ERROR)?;
            tokio::spawn(pump::input(connection, sink, exit.clone()));
        }
        let outputs = [(self.stdout, connections.stdout), (self.stderr, connections.stderr)];
        for (fd, connection) in outputs {
            if let (Some(fd), Some(connection)) = (fd, connection) {
                let source = endpoint(fd, Interest::READABLE)?;
                tokio::spawn(pump::output(source, connection, exit.clone()));
            }
        }
        Ok(())
    }
}

/// Starts moving bytes between a terminal and the host, and returns the terminal for resizing.
///
/// # Errors
///
/// The descriptor cannot be registered with the runtime.
pub(crate) fn connect_terminal(
    master: OwnedFd,
    connections: Connections,
    exit: &ExitReceiver,
) -> Result<Endpoint> {
    let terminal = endpoint(master, Interest::READABLE | Interest::WRITABLE)?;
    if let Some(connection) = connections.stdin {
        tokio::spawn(pump::terminal_input(connection, terminal.clone(), exit.clone()));
    }
    // Output that nobody wants is thrown away, or the process would stop when the terminal is full.
    match connections.stdout {
        Some(connection) => {
            tokio::spawn(pump::output(terminal.clone(), connection, exit.clone()));
        }
        None => {
            let terminal = terminal.clone();
            tokio::spawn(async move { pump::discard(&terminal).await });
        }
    }
    Ok(terminal)
}

fn endpoint(fd: OwnedFd, interest: Interest) -> Result<Endpoint> {
    pump::endpoint(fd, interest).context(|| "watch a standard stream")
}

fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    pipe_with(PipeFlags::CLOEXEC).context(|| "make a pipe")
}

fn null() -> Result<OwnedFd> {
    path::open_in_guest("/dev/null", OFlags::RDWR).context(|| "open /dev/null")
}

//! The standard streams of a process: pipes between the process and the host's connections.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use rustix::fs::OFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::path;
use crate::error::{Context as _, Error, Result};
use crate::pump::{self, Endpoint, Late, Output, Written};
use crate::reaper::ExitReceiver;
use crate::stream::Connection;

/// The host's connections for one process.
pub(crate) struct Connections {
    pub(crate) stdin: Option<Connection>,
    pub(crate) stdout: Option<Connection>,
    pub(crate) stderr: Option<Connection>,
    /// Connections of the descriptors from 3 on.
    pub(crate) further: Vec<Further>,
}

/// The host's connections for a descriptor beyond the standard streams.
pub(crate) struct Further {
    /// Stream that the process reads.
    pub(crate) input: Option<Connection>,
    /// Stream that the process writes.
    pub(crate) output: Option<Connection>,
}

/// The agent's ends of a process's pipes. A stream without a connection is /dev/null.
#[derive(Default)]
pub(crate) struct Pipes {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    further: Vec<Option<OwnedFd>>,
    /// True if the standard streams belong to a terminal.
    terminal: bool,
}

impl Pipes {
    /// Makes the pipes for the connections. Returns the process's ends in the order of its
    /// descriptors: from 0 on, or from 3 on with a terminal.
    pub(crate) fn make(connections: &Connections, terminal: bool) -> Result<(Self, Vec<OwnedFd>)> {
        let mut pipes = Self { terminal, ..Self::default() };
        let mut theirs = Vec::new();
        if !terminal {
            let (input, stdin) = Self::input(connections.stdin.is_some())?;
            let (output, stdout) = Self::output(connections.stdout.is_some())?;
            let (error, stderr) = Self::output(connections.stderr.is_some())?;
            theirs.extend([input, output, error]);
            pipes = Self { stdin, stdout, stderr, ..pipes };
        }
        for Further { input, output } in &connections.further {
            let (fd, ours) = match (input.is_some(), output.is_some()) {
                (true, true) => socket()?,
                (input, false) => Self::input(input)?,
                (false, true) => Self::output(true)?,
            };
            theirs.push(fd);
            pipes.further.push(ours);
        }
        Ok((pipes, theirs))
    }

    fn input(connected: bool) -> Result<(OwnedFd, Option<OwnedFd>)> {
        if !connected {
            return Ok((null()?, None));
        }
        let (read, write) = pipe()?;
        Ok((read, Some(write)))
    }

    fn output(connected: bool) -> Result<(OwnedFd, Option<OwnedFd>)> {
        if !connected {
            return Ok((null()?, None));
        }
        let (read, write) = pipe()?;
        Ok((write, Some(read)))
    }

    /// Starts moving bytes.
    pub(crate) fn connect(
        self,
        mut connections: Connections,
        terminal: Option<OwnedFd>,
        late: Late,
        exit: &ExitReceiver,
    ) -> Result<Connected> {
        let mut connected = Connected::default();
        for (fd, further) in self.further.into_iter().zip(connections.further.drain(..)) {
            if let Some(fd) = fd {
                connected.written.extend(connect_further(fd, further, late, exit)?);
            }
        }
        match (self.terminal, terminal) {
            (true, Some(master)) => {
                connect_terminal(master, connections, exit, &mut connected)?;
                return Ok(connected);
            }
            (true, None) => return Err(Error::internal("the process has not sent its terminal")),
            (false, _) => {}
        }
        if let (Some(fd), Some(connection)) = (self.stdin, connections.stdin) {
            let sink = endpoint(fd, Interest::WRITABLE | Interest::ERROR)?;
            tokio::spawn(pump::standard_input(connection, sink, exit.clone()));
        }
        let outputs = [(self.stdout, connections.stdout), (self.stderr, connections.stderr)];
        for (fd, connection) in outputs {
            if let (Some(fd), Some(connection)) = (fd, connection) {
                let source = endpoint(fd, Interest::READABLE)?;
                connected.written.push(connect_output(source, connection, late, exit));
            }
        }
        Ok(connected)
    }
}

/// Streams that are connected.
#[derive(Debug, Default)]
pub(crate) struct Connected {
    /// The process's terminal, until it is hung up.
    pub(crate) terminal: Option<Weak<AsyncFd<OwnedFd>>>,
    /// The outputs: those from descriptor 3 on, then standard output and error.
    pub(crate) written: Vec<Written>,
}

fn connect_output(
    source: Endpoint,
    connection: Connection,
    late: Late,
    exit: &ExitReceiver,
) -> Written {
    let output = Output::new(source, late);
    let written = output.written();
    tokio::spawn(output.send(connection, exit.clone()));
    written
}

fn connect_further(
    fd: OwnedFd,
    further: Further,
    late: Late,
    exit: &ExitReceiver,
) -> Result<Option<Written>> {
    match (further.input, further.output) {
        (Some(input), Some(output)) => {
            let socket = endpoint(fd, Interest::READABLE | Interest::WRITABLE)?;
            tokio::spawn(pump::socket_input(input, socket.clone(), exit.clone()));
            Ok(Some(connect_output(socket, output, late, exit)))
        }
        (Some(input), None) => {
            let sink = endpoint(fd, Interest::WRITABLE | Interest::ERROR)?;
            tokio::spawn(pump::input(input, sink, exit.clone()));
            Ok(None)
        }
        (None, Some(output)) => {
            let source = endpoint(fd, Interest::READABLE)?;
            Ok(Some(connect_output(source, output, late, exit)))
        }
        (None, None) => Ok(None),
    }
}

/// Starts moving bytes between a terminal and the host.
fn connect_terminal(
    master: OwnedFd,
    connections: Connections,
    exit: &ExitReceiver,
    connected: &mut Connected,
) -> Result<()> {
    let terminal = endpoint(master, Interest::READABLE | Interest::WRITABLE)?;
    connected.terminal = Some(Arc::downgrade(&terminal));
    let Connections { stdin, stdout, .. } = connections;
    if stdout.is_some() {
        connected.written.push(Output::new(terminal.clone(), Late::Dropped).written());
    }
    tokio::spawn(pump::terminal(terminal, stdin, stdout, exit.clone()));
    Ok(())
}

fn endpoint(fd: OwnedFd, interest: Interest) -> Result<Endpoint> {
    pump::endpoint(fd, interest).context(|| "register a stream of the process")
}

fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    pipe_with(PipeFlags::CLOEXEC).context(|| "make a pipe")
}

/// Makes a socket pair: the process's end and the agent's.
fn socket() -> Result<(OwnedFd, Option<OwnedFd>)> {
    let flags = SocketFlags::CLOEXEC;
    let (theirs, ours) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .context(|| "make a socket pair")?;
    Ok((theirs, Some(ours)))
}

fn null() -> Result<OwnedFd> {
    path::open_in_guest("/dev/null", OFlags::RDWR).context(|| "open /dev/null")
}

//! The lab's end of one port: runs a caller's command and carries its streams. Each port has its
//! own process.
//!
//! ```text
//! idle --greeting--> greeted --Start--> running --child ended, output drained--> ended --> idle
//!        from every state back to idle, if the caller hangs up or sends a broken frame:
//!        a running command is killed with its cgroup
//! ```

use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::child::{Child, Stream};
use super::command::Run;
use super::wire::{HEADER_LEN, Kind, MAGIC, NONCE_LEN, parse_header, push_frame};

/// Bytes of unsent output from which on the streams of the command are no longer read.
const MAX_WAITING: usize = 256 * 1024;

/// Time in milliseconds without a connection after which the caller counts as gone.
const HANG_UP_MS: u16 = 500;

/// Bytes read from a stream at a time.
const CHUNK: usize = 32 * 1024;

/// Serves the port `device`. Returns only with an error.
pub(super) fn serve(device: &Path) -> Result<()> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(device)
        .context("cannot open it")?;
    let name = device.file_name().unwrap_or_default().to_string_lossy().into_owned();
    // Without a caller a level-triggered wait returns POLLHUP at once, so the wait is for edges.
    let edges = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("cannot make an epoll")?;
    // EPOLLOUT: a port without a caller has no room for output, so a new caller is an edge.
    let changes = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
    let event = EpollEvent::new(changes, 0);
    edges.add(&file, event).context("cannot watch the port")?;
    let mut port = LabPort { file, edges, input: Vec::new(), output: Vec::new() };
    for turn in 0_u64.. {
        let nonce = port.await_greeting()?;
        port.output.clear();
        port.output.extend_from_slice(MAGIC);
        port.output.extend_from_slice(&nonce);
        port.serve_caller(&format!("{name}-{turn}"))?;
    }
    Ok(())
}

/// The lab's end of a port.
struct LabPort {
    file: File,
    /// Edge-triggered notification of changes of the port's state.
    edges: Epoll,
    /// Received bytes of frames that are not complete.
    input: Vec<u8>,
    /// Bytes to send.
    output: Vec<u8>,
}

/// Next state of a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Continue,
    /// The caller hung up or sent a broken frame.
    Abandon,
}

impl LabPort {
    /// Waits for the greeting of a caller. Returns the number in it.
    fn await_greeting(&mut self) -> Result<[u8; NONCE_LEN]> {
        loop {
            self.receive()?;
            if let Some(start) = self.input.windows(MAGIC.len()).rposition(|seen| seen == MAGIC) {
                let end = start + MAGIC.len() + NONCE_LEN;
                if let Some(nonce) = self.input.get(..end).and_then(|seen| seen.last_chunk()) {
                    let nonce = *nonce;
                    self.input.drain(..end);
                    return Ok(nonce);
                }
            } else {
                // The last bytes may be the beginning of a greeting.
                let useless = self.input.len().saturating_sub(MAGIC.len());
                self.input.drain(..useless);
            }
            self.await_change(EpollTimeout::NONE)?;
        }
    }

    /// Waits for a change of the port's state. Returns false if none came within `most`.
    fn await_change(&self, most: EpollTimeout) -> Result<bool> {
        match self.edges.wait(&mut [EpollEvent::empty()], most) {
            Ok(changes) => Ok(changes > 0),
            Err(Errno::EINTR) => Ok(true),
            Err(error) => Err(error).context("cannot wait for the port"),
        }
    }

    /// Tells if no caller is connected for [`HANG_UP_MS`].
    ///
    /// The end of one caller may be reported after the first bytes of the next caller.
    fn hung_up(&self) -> Result<bool> {
        let mut time_is_up = false;
        loop {
            let mut fds = [PollFd::new(self.file.as_fd(), PollFlags::empty())];
            poll(&mut fds, PollTimeout::ZERO).context("cannot ask for the port's state")?;
            if fds[0].revents().unwrap_or(PollFlags::empty()).is_empty() {
                return Ok(false);
            }
            if time_is_up {
                return Ok(true);
            }
            time_is_up = !self.await_change(HANG_UP_MS.into())?;
        }
    }

    /// Reads all bytes that have arrived.
    fn receive(&mut self) -> Result<()> {
        let mut chunk = vec![0; CHUNK];
        loop {
            match self.file.read(&mut chunk) {
                // Nobody is connected.
                Ok(0) => return Ok(()),
                Ok(length) => self.input.extend_from_slice(&chunk[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("cannot read from the port"),
            }
        }
    }

    /// Sends until the port has no more room.
    fn send(&mut self) -> Result<()> {
        while !self.output.is_empty() {
            match self.file.write(&self.output) {
                Ok(length) => drop(self.output.drain(..length)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("cannot write to the port"),
            }
        }
        Ok(())
    }

    /// Serves a caller from its greeting to the end of its command.
    fn serve_caller(&mut self, name: &str) -> Result<()> {
        let mut child: Option<Child> = None;
        let mut ended = false;
        let outcome = loop {
            if let Some(running) = &mut child
                && let Some(status) = running.finished(self.output.len() < MAX_WAITING)
            {
                push_frame(&mut self.output, Kind::Exit, &status.to_le_bytes());
                running.release();
                child = None;
                ended = true;
            }
            self.send()?;
            if ended && self.output.is_empty() {
                break Next::Continue;
            }
            if self.wait_and_pump(child.as_mut())? == Next::Abandon {
                break Next::Abandon;
            }
            if self.handle_frames(&mut child, &mut ended, name) == Next::Abandon {
                break Next::Abandon;
            }
        };
        if outcome == Next::Abandon
            && let Some(running) = &mut child
        {
            running.kill();
        }
        Ok(())
    }

    /// Waits for the port or a stream, and moves bytes between them.
    fn wait_and_pump(&mut self, child: Option<&mut Child>) -> Result<Next> {
        let room = self.output.len() < MAX_WAITING;
        let port_events = match self.output.is_empty() {
            true => PollFlags::POLLIN,
            false => PollFlags::POLLIN | PollFlags::POLLOUT,
        };
        // Input that the command does not read yet stays with the caller.
        let wants_input = child.as_ref().is_none_or(|child| child.wants_input());
        let port_events = if wants_input { port_events } else { port_events - PollFlags::POLLIN };
        let mut fds = vec![PollFd::new(self.file.as_fd(), port_events)];
        let watched: Vec<(Stream, BorrowedFd<'_>, PollFlags)> =
            child.as_ref().map_or_else(Vec::new, |child| child.watched(room));
        fds.extend(watched.iter().map(|(_, fd, events)| PollFd::new(*fd, *events)));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("cannot wait for the port"),
        }
        let events: Vec<PollFlags> =
            fds.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty())).collect();
        drop(fds);
        let ready: Vec<Stream> = watched
            .iter()
            .zip(&events[1..])
            .filter(|(_, events)| !events.is_empty())
            .map(|((stream, _, _), _)| *stream)
            .collect();
        drop(watched);
        if events[0].contains(PollFlags::POLLIN) {
            self.receive()?;
        }
        if let Some(child) = child {
            for stream in ready {
                child.pump(stream, &mut self.output);
            }
        }
        let hung_up = events[0].intersects(PollFlags::POLLHUP | PollFlags::POLLERR);
        Ok(if hung_up && self.hung_up()? { Next::Abandon } else { Next::Continue })
    }

    /// Handles the complete frames of the input.
    fn handle_frames(&mut self, child: &mut Option<Child>, ended: &mut bool, name: &str) -> Next {
        while let Some(header) = self.input.first_chunk::<HEADER_LEN>() {
            let Some((kind, length)) = parse_header(*header) else { return Next::Abandon };
            let Some(payload) = self.input.get(HEADER_LEN..HEADER_LEN + length) else { break };
            match (kind, child.as_mut()) {
                (Kind::Pad, _) => {}
                (Kind::Start, None) if !*ended => {
                    match Run::from_json(payload).and_then(|run| Child::start(&run, name)) {
                        Ok(started) => *child = Some(started),
                        Err(error) => {
                            let why = format!("{error:#}");
                            push_frame(&mut self.output, Kind::Refused, why.as_bytes());
                            *ended = true;
                        }
                    }
                }
                (Kind::Stdin, Some(child)) => child.feed(payload),
                // The caller has sent it before it knew the end of the command.
                (Kind::Stdin, None) if *ended => {}
                _ => return Next::Abandon,
            }
            self.input.drain(..HEADER_LEN + length);
        }
        Next::Continue
    }
}

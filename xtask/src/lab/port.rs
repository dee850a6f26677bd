//! The lab's end of one port: runs a caller's command and carries its streams. One process each.
//!
//! ```text
//! idle --greeting--> greeted --Start--> running --child ended, output drained--> ended --> idle
//!        a caller that hangs up, or a broken frame, leads from anywhere back to idle:
//!        a command that still runs is killed with its cgroup
//! ```

use std::fs::{self, File};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::thread;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::Run;
use super::child::{Child, Stream};
use super::wire::{HEADER_LEN, Kind, MAGIC, NONCE_LEN, parse_header, push_frame};

/// Bytes of output that may wait for the caller before the command has to.
const MAX_WAITING: usize = 256 * 1024;

/// How long nobody may be connected before a caller counts as gone, in milliseconds.
const HANG_UP_MS: u16 = 500;

/// Bytes read from a stream at a time.
const CHUNK: usize = 32 * 1024;

/// Serves the port `device` until it fails.
pub(super) fn serve(device: &Path) -> Result<()> {
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(device)
        .context("cannot open it")?;
    let name = device.file_name().unwrap_or_default().to_string_lossy().into_owned();
    // Without a caller the port reports POLLHUP at any time: only edges can be waited for.
    let edges = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("cannot make an epoll")?;
    // Room for output appears when a caller does.
    let changes = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
    let event = EpollEvent::new(changes, 0);
    edges.add(&file, event).context("cannot watch the port")?;
    let mut port = Port { file, edges, input: Vec::new(), output: Vec::new() };
    for turn in 0_u64.. {
        let nonce = port.await_greeting()?;
        port.output.clear();
        port.output.extend_from_slice(MAGIC);
        port.output.extend_from_slice(&nonce);
        port.converse(&format!("{name}-{turn}"))?;
    }
    Ok(())
}

struct Port {
    file: File,
    /// Tells of every change of the port's state.
    edges: Epoll,
    /// Received and not yet understood.
    input: Vec<u8>,
    /// To be sent.
    output: Vec<u8>,
}

/// How a conversation goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Continue,
    /// The caller hung up, or sent what no caller sends.
    Abandon,
}

impl Port {
    /// Waits for a caller's greeting and returns its number.
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
                // All but what may be the beginning of a greeting.
                let useless = self.input.len().saturating_sub(MAGIC.len());
                self.input.drain(..useless);
            }
            self.await_change(EpollTimeout::NONE)?;
        }
    }

    /// Waits for a change of the port's state; says whether there was one in time.
    fn await_change(&self, most: EpollTimeout) -> Result<bool> {
        match self.edges.wait(&mut [EpollEvent::empty()], most) {
            Ok(changes) => Ok(changes > 0),
            Err(Errno::EINTR) => Ok(true),
            Err(error) => Err(error).context("cannot wait for the port"),
        }
    }

    /// Whether nobody is connected, for longer than it takes one caller to follow another: word of
    /// an earlier caller's end may come later than the first bytes of the next caller.
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

    /// Reads what has arrived.
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

    /// Sends what can be sent now.
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

    /// Everything between a greeting and the end of what it led to.
    fn converse(&mut self, name: &str) -> Result<()> {
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
            if self.understand(&mut child, &mut ended, name) == Next::Abandon {
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

    /// Waits until something can be done, and moves bytes between port and streams.
    fn wait_and_pump(&mut self, child: Option<&mut Child>) -> Result<Next> {
        let room = self.output.len() < MAX_WAITING;
        let port_events = match self.output.is_empty() {
            true => PollFlags::POLLIN,
            false => PollFlags::POLLIN | PollFlags::POLLOUT,
        };
        // Input that the command does not take stays with the caller.
        let hungry = child.as_ref().is_none_or(|child| child.wants_input());
        let port_events = if hungry { port_events } else { port_events - PollFlags::POLLIN };
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

    /// Acts on the frames that have arrived whole.
    fn understand(&mut self, child: &mut Option<Child>, ended: &mut bool, name: &str) -> Next {
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
                // Sent before the caller could know that the command has ended.
                (Kind::Stdin, None) if *ended => {}
                _ => return Next::Abandon,
            }
            self.input.drain(..HEADER_LEN + length);
        }
        Next::Continue
    }
}

/// Reads `stream` to its end in the background, so that a process that outlives the command and
/// still holds it is not killed by what it writes.
pub(super) fn discard(mut stream: impl std::io::Read + Send + 'static) {
    thread::spawn(move || std::io::copy(&mut stream, &mut std::io::sink()));
}

/// Removes the cgroup of a command unless processes of it live on.
pub(super) fn remove_cgroup(path: &Path) {
    // A daemon that the command left behind keeps its cgroup, as it would keep a session's scope.
    let _ = fs::remove_dir(path);
}

//! Copying between a descriptor and its connection to the guest. Each direction has a thread.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::Shutdown,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};
use tokio::sync::watch;

/// Most bytes of one read: a little less than a socket's buffer holds by default.
const BUFFER_LEN: usize = 128 * 1024;

/// Output on its way from the guest, shared by the thread that relays it and the tasks that wait
/// for it.
#[derive(Debug)]
pub(crate) struct Flow {
    pub(crate) remote: UnixStream,
    /// Bytes that the guest has sent so far.
    pub(crate) received: AtomicU64,
    /// Bytes that have been written to the local descriptor so far. Dropped at the end.
    written: watch::Sender<u64>,
    /// True while the thread waits for the guest, and not for the local reader.
    pub(crate) waiting: AtomicBool,
}

impl Flow {
    /// Makes a flow, and the receiver of the number of bytes written.
    pub(crate) fn new(remote: UnixStream) -> (Self, watch::Receiver<u64>) {
        let (written, progress) = watch::channel(0);
        let (received, waiting) = (AtomicU64::new(0), AtomicBool::new(false));
        (Self { remote, received, written, waiting }, progress)
    }

    /// Reads the guest's next bytes.
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.waiting.store(true, Ordering::Relaxed);
        let received = (&self.remote).read(buffer);
        self.waiting.store(false, Ordering::Relaxed);
        if let Ok(length) = received {
            self.received.fetch_add(length as u64, Ordering::Relaxed);
        }
        received
    }
}

/// Waits until the guest's process waits for its input. Returns false if it never will.
pub(crate) fn is_wanted(mut remote: &UnixStream) -> bool {
    remote.read_exact(&mut [0]).is_ok()
}

/// Says that input is waited for, to a client that passes it on.
pub(crate) fn want(client: &OwnedFd) -> io::Result<()> {
    Ok(rustix::io::write(client, &[0]).map(drop)?)
}

/// Passes the input of a terminal on to the process that relays the streams, in the place of that
/// process: a terminal's job control holds for the processes of its session. Nothing is read before
/// the input is wanted.
pub(crate) fn pass_on(terminal: &OwnedFd, relay: &UnixStream) {
    if is_wanted(relay) && copy_input(terminal, relay) == InputEnd::HungUp {
        // The other end tells this from the end of the input.
        let _ = relay.shutdown(Shutdown::Both);
    }
}

/// The end of an input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum InputEnd {
    /// No more input, or no reader for it.
    Plain,
    /// The other end has been closed: a terminal has been hung up.
    HungUp,
}

/// Copies from `local` to `remote` until either ends, and passes the end of input on.
pub(crate) fn copy_input(local: &OwnedFd, remote: &UnixStream) -> InputEnd {
    let mut buffer = vec![0; BUFFER_LEN];
    let mut remote_out = remote;
    let mut end = InputEnd::Plain;
    loop {
        match wait_for_input(local, remote) {
            Ok(Some(found)) => end = found,
            // The guest's reader is gone. The rest of the input is left to other readers.
            Ok(None) => return InputEnd::Plain,
            Err(_) => break,
        }
        let length = match rustix::io::read(local, &mut buffer) {
            Ok(0) => break,
            Ok(length) => length,
            Err(Errno::INTR | Errno::AGAIN) => continue,
            // One case is a terminal that has hung up. There will be no more input.
            Err(_) => break,
        };
        if remote_out.write_all(&buffer[..length]).is_err() {
            return InputEnd::Plain;
        }
    }
    // The guest's side may be gone already.
    let _ = remote.shutdown(Shutdown::Write);
    end
}

/// Waits for something to read from `local`, the end included. Returns [`InputEnd::HungUp`] if the
/// other end of `local` has been closed, and `None` if `remote` was closed instead.
fn wait_for_input(local: &OwnedFd, remote: &UnixStream) -> io::Result<Option<InputEnd>> {
    loop {
        let mut fds = [PollFd::new(local, PollFlags::IN), PollFd::new(remote, PollFlags::RDHUP)];
        match poll(&mut fds, None) {
            Err(Errno::INTR) => continue,
            result => result.map(drop)?,
        }
        let closed = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL;
        if fds[1].revents().intersects(closed) {
            return Ok(None);
        }
        let found = fds[0].revents();
        if !found.is_empty() {
            let hung_up = found.contains(PollFlags::HUP);
            return Ok(Some(if hung_up { InputEnd::HungUp } else { InputEnd::Plain }));
        }
    }
}

/// Copies from the guest to `local` until either ends.
pub(crate) fn copy_output(flow: &Flow, local: &OwnedFd) {
    let mut buffer = vec![0; BUFFER_LEN];
    loop {
        let length = match flow.receive(&mut buffer) {
            Ok(0) => return,
            Ok(length) => length,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        if let Err(e) = write_all(local, &buffer[..length]) {
            // The reader is gone, or the disk is full. The process gets the same from its next
            // write, when the agent sees the connection closed.
            if e != Errno::PIPE {
                log::debug!("output is lost: {e}");
            }
            let _ = flow.remote.shutdown(Shutdown::Both);
            return;
        }
        flow.written.send_modify(|written| *written += length as u64);
    }
}

/// Writes all of `bytes`, also to a descriptor that another process has made non-blocking.
pub(crate) fn write_all(local: &OwnedFd, mut bytes: &[u8]) -> std::result::Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(local, bytes) {
            Ok(0) => return Err(Errno::IO),
            Ok(length) => bytes = &bytes[length..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                match poll(&mut [PollFd::new(&local.as_fd(), PollFlags::OUT)], None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(e) => return Err(e),
                }
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

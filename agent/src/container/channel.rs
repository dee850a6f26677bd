//! Messages over the socket pair between the agent and a process of a container.
//!
//! The process is still the agent's program then. The agent sends the request and the document. The
//! process answers that it is ready to call `execve`, or why not. The agent sends the start, and
//! `execve` closes the socket.

use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use isopod_protocol::MAX_FURTHER_STREAMS;
use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

use super::namespaces::Namespaces;
use super::seccomp::SeccompFilter;
use super::terminal::Screen;
use crate::oci::HookState;

/// Longest payload of a message in bytes. A config.json is far shorter.
const MAX_PAYLOAD: usize = 64 << 20;

/// Most descriptors with one message.
const MAX_FDS: usize = 4 + MAX_FURTHER_STREAMS;

/// The role of the new process, and its settings.
///
/// Descriptors follow in this order. [`InitRequest::Exec`] begins with a pidfd of the container.
/// Standard input, output and error come next, unless there is a terminal. The last ones are the
/// descriptors from 3 on.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum InitRequest {
    /// The first process of a container. A config.json follows.
    Create {
        cgroup: String,
        filter: Option<SeccompFilter>,
        screen: Screen,
        state: Option<HookState>,
    },
    /// A further process of a container. A `process` object follows.
    Exec {
        namespaces: Namespaces,
        filter: Option<SeccompFilter>,
        personality: Option<u32>,
        screen: Screen,
    },
}

/// Kinds of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Tag {
    /// An [`InitRequest`] as JSON.
    Request = 1,
    /// The JSON document that the request announces.
    Document,
    /// The master side of the terminal, as a descriptor.
    Terminal,
    /// The process is ready to call `execve`.
    Ready,
    /// The process is to call `execve`.
    Start,
    /// An [`crate::error::Error`] as JSON. The process exits after it.
    Failed,
}

impl Tag {
    fn of(byte: u8) -> Option<Self> {
        [Self::Request, Self::Document, Self::Terminal, Self::Ready, Self::Start, Self::Failed]
            .into_iter()
            .find(|tag| *tag as u8 == byte)
    }
}

/// One message.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) tag: Tag,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

/// One end of the socket pair.
#[derive(Debug)]
pub(crate) struct Channel(UnixStream);

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Channel {
    /// Makes a connected pair. Reads and writes on the first end fail after `timeout`, if there is
    /// one.
    pub(crate) fn pair(timeout: Option<Duration>) -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(timeout)?;
        ours.set_write_timeout(timeout)?;
        Ok((Self(ours), theirs.into()))
    }

    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self(fd.into())
    }

    /// Moves the socket to a descriptor number of at least `first`.
    pub(crate) fn move_to(&mut self, first: i32) -> io::Result<()> {
        self.0 = rustix::io::fcntl_dupfd_cloexec(&self.0, first)?.into();
        Ok(())
    }

    /// Sends a message with descriptors. [`timed_out`] recognises the error of a peer that does not
    /// read.
    pub(crate) fn send(&self, tag: Tag, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let length = u32::try_from(payload.len()).map_err(io::Error::other)?;
        let mut header = [tag as u8; 5];
        header[1..].copy_from_slice(&length.to_le_bytes());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::other("too many descriptors for one message"));
        }
        // Five bytes always go in one piece, together with the descriptors. The kernel does not
        // restart a call with a timeout after a signal, and SIGCHLD is frequent in the agent.
        retry_on_intr(|| {
            sendmsg(&self.0, &[IoSlice::new(&header)], &mut control, SendFlags::NOSIGNAL)
        })?;
        (&self.0).write_all(payload)
    }

    /// Receives a message, or `None` when the other end is closed. [`timed_out`] recognises the
    /// error of a silent peer.
    pub(crate) fn receive(&self) -> io::Result<Option<Message>> {
        let mut header = [0; 5];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = {
            let mut parts = [IoSliceMut::new(&mut header)];
            retry_on_intr(|| recvmsg(&self.0, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC))
        };
        let n = match received {
            Ok(received) => received.bytes,
            // The peer has closed its end with bytes unread.
            Err(rustix::io::Errno::CONNRESET) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        if n == 0 {
            return Ok(None);
        }
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        (&self.0).read_exact(&mut header[n..])?;
        let tag = Tag::of(header[0]).ok_or(io::ErrorKind::InvalidData)?;
        let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
        if length > MAX_PAYLOAD {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut payload = vec![0; length];
        (&self.0).read_exact(&mut payload)?;
        Ok(Some(Message { tag, payload, fds }))
    }
}

/// Returns true for the error of a [`Channel::pair`] whose timeout has passed.
pub(crate) fn timed_out(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::WouldBlock
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn messages_and_descriptors_arrive() {
        let (ours, theirs) = Channel::pair(Some(Duration::from_secs(60))).unwrap();
        let theirs = Channel::new(theirs);
        let (read, write) = rustix::pipe::pipe().unwrap();
        ours.send(Tag::Document, b"{}", &[write.as_fd()]).unwrap();
        ours.send(Tag::Start, b"", &[]).unwrap();
        drop((ours, write));
        let message = theirs.receive().unwrap().unwrap();
        assert_eq!((message.tag, message.payload.as_slice()), (Tag::Document, &b"{}"[..]));
        rustix::io::write(&message.fds[0], b"x").unwrap();
        assert_eq!(rustix::io::read(&read, &mut [0_u8; 2]).unwrap(), 1);
        assert_eq!(theirs.receive().unwrap().unwrap().tag, Tag::Start);
        assert!(theirs.receive().unwrap().is_none());
    }

    #[test]
    fn waits_are_bounded() {
        let (ours, theirs) = Channel::pair(Some(Duration::from_millis(20))).unwrap();
        assert!(timed_out(&ours.receive().unwrap_err()));
        // The message exceeds the socket's buffer, and the peer does not read.
        assert!(timed_out(&ours.send(Tag::Document, &vec![0; 4 << 20], &[]).unwrap_err()));
        drop(theirs);
        assert!(!timed_out(&ours.send(Tag::Start, &[], &[]).unwrap_err()));
    }
}

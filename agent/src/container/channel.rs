//! What the agent and a container's first process, while it is still the agent's program, say to
//! each other over a socket pair.
//!
//! The agent sends the request and the document, the process answers when it is ready to call
//! `execve` or why it is not, the agent sends the start, and the socket closes with `execve`.

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
use super::seccomp::Filter;
use super::terminal::Screen;
use crate::oci::State;

/// Longest payload of a message. A config.json is far shorter.
const MAX_PAYLOAD: usize = 64 << 20;

/// Most descriptors with a message.
const MAX_FDS: usize = 4 + MAX_FURTHER_STREAMS;

/// What the process is to become. Descriptors follow in this order: standard input, output and
/// error, unless there is a terminal, and what the process has from 3 on; for [`Request::Exec`] before
/// these a pidfd of the container.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// The first process of a container; a config.json follows.
    Create { cgroup: String, filter: Option<Filter>, screen: Screen, state: Option<State> },
    /// A further process of a container; a `process` object follows.
    Exec {
        namespaces: Namespaces,
        filter: Option<Filter>,
        personality: Option<u32>,
        screen: Screen,
    },
}

/// Kinds of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Tag {
    /// A [`Request`] as JSON.
    Request = 1,
    /// The JSON document that the request announces.
    Document,
    /// The master side of the terminal, as a descriptor.
    Terminal,
    /// Ready to call `execve`.
    Ready,
    /// Call `execve`.
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
    /// A connected pair. On the first end nothing waits longer than `patience`, if that is given,
    /// for the other.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn pair(patience: Option<Duration>) -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(patience)?;
        ours.set_write_timeout(patience)?;
        Ok((Self(ours), theirs.into()))
    }

    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self(fd.into())
    }

    /// Leaves the descriptors below `first` to others.
    ///
    /// # Errors
    ///
    /// There are no more descriptors.
    pub(crate) fn move_to(&mut self, first: i32) -> io::Result<()> {
        self.0 = rustix::io::fcntl_dupfd_cloexec(&self.0, first)?.into();
        Ok(())
    }

    /// Sends a message with descriptors.
    ///
    /// # Errors
    ///
    /// The other end is gone, or does not read; see [`timed_out`].
    pub(crate) fn send(&self, tag: Tag, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let length = u32::try_from(payload.len()).map_err(io::Error::other)?;
        let mut header = [tag as u8; 5];
        header[1..].copy_from_slice(&length.to_le_bytes());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::other("too many descriptors for one message"));
        }
        // Five bytes always go in one piece, and the descriptors with them. A wait that is bounded
        // is not resumed after a signal, and children of the agent end all the time.
        retry_on_intr(|| {
            sendmsg(&self.0, &[IoSlice::new(&header)], &mut control, SendFlags::NOSIGNAL)
        })?;
        (&self.0).write_all(payload)
    }

    /// Receives a message, or `None` when the other end is gone.
    ///
    /// # Errors
    ///
    /// The other end went away in the middle of a message, or it makes no sense, or nothing came;
    /// see [`timed_out`].
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
            // Closed with bytes unread.
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

/// Whether the other end has let the patience of a [`Channel::pair`] run out.
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
    fn patience_is_bounded() {
        let (ours, theirs) = Channel::pair(Some(Duration::from_millis(20))).unwrap();
        assert!(timed_out(&ours.receive().unwrap_err()));
        // More than the socket holds, and nobody reads.
        assert!(timed_out(&ours.send(Tag::Document, &vec![0; 4 << 20], &[]).unwrap_err()));
        drop(theirs);
        assert!(!timed_out(&ours.send(Tag::Start, &[], &[]).unwrap_err()));
    }
}

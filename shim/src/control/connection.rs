//! A connection of the control socket: lines of JSON, with descriptors beside them.

use std::{
    io::{self, ErrorKind, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream as StdUnixStream,
    },
    time::Duration,
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::Serialize;
use tokio::{
    io::Interest,
    net::UnixStream,
    time::{sleep, timeout},
};

use crate::{
    control::message::{MAX_MESSAGE_LEN, Message, line},
    error::{Error, Explain, Result},
    state::{CONTROL_SOCKET, StateDir},
    text::seconds,
};

/// Most descriptors of one packet. The kernel takes 253 (`SCM_MAX_FD`).
const MAX_PACKET: usize = 128;

/// Most descriptors of one message: a mount for each bind mount of a container, and some more.
const MAX_DESCRIPTORS: usize = 4096;

/// Most bytes of one read.
const READ_LEN: usize = 16 << 10;

/// Pause before the next attempt to connect to a sandbox process whose queue of connections is
/// full.
const QUEUE_PAUSE: Duration = Duration::from_millis(10);

/// Longest time for a sandbox process to take a connection. One that is stopped takes none.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// A message as it came: a line, and the descriptors beside it.
#[derive(Debug)]
pub(crate) struct Packet {
    /// The line, with its newline.
    pub line: Vec<u8>,
    /// The descriptors, in the order in which they were sent. A client passes descriptors only with
    /// its first line: the kernel may join a line without descriptors with the next one.
    pub descriptors: Vec<OwnedFd>,
}

/// A connection of the control socket.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: UnixStream,
    /// Bytes that have arrived and are no whole line yet.
    buffer: Vec<u8>,
    /// Descriptors that have arrived with these bytes.
    descriptors: Vec<OwnedFd>,
}

impl Connection {
    /// Connects to the sandbox process whose state directory is `dir`.
    ///
    /// # Errors
    ///
    /// If the sandbox process is ending or gone, or is stopped.
    pub(crate) async fn connect(dir: &StateDir) -> Result<Self> {
        let what = || "cannot talk to the sandbox process".to_owned();
        let path = dir.short_path(CONTROL_SOCKET);
        let connect = async {
            loop {
                match UnixStream::connect(&path).await {
                    // The queue of connections is full.
                    Err(e) if e.kind() == ErrorKind::WouldBlock => sleep(QUEUE_PAUSE).await,
                    result => break result.explain(what),
                }
            }
        };
        let socket = timeout(CONNECT_TIMEOUT, connect).await.unwrap_or_else(|_| {
            let limit = seconds(CONNECT_TIMEOUT);
            Err(Error::new(format!("{}: it takes no connection within {limit}", what())))
        })?;
        Ok(Self::of(socket))
    }

    /// Takes over a connected socket.
    pub(crate) fn new(socket: StdUnixStream) -> Result<Self> {
        let what = || "cannot use a connection".to_owned();
        socket.set_nonblocking(true).explain(what)?;
        Ok(Self::of(UnixStream::from_std(socket).explain(what)?))
    }

    pub(super) fn of(socket: UnixStream) -> Self {
        Self { socket, buffer: Vec::new(), descriptors: Vec::new() }
    }

    /// Pid of the process at the other end; 0 if it is in another pid namespace.
    pub(super) fn peer(&self) -> Option<i32> {
        Some(self.socket.peer_cred().ok()?.pid().unwrap_or(0))
    }

    /// Receives the next line, and the descriptors beside it; `None` at the end of the connection.
    /// A line that is cut off or too long is an error. A cancelled call loses nothing.
    pub(crate) async fn receive(&mut self) -> io::Result<Option<Packet>> {
        let mut searched = 0;
        loop {
            let end = self.buffer[searched..].iter().position(|byte| *byte == b'\n');
            if let Some(end) = end {
                let rest = self.buffer.split_off(searched + end + 1);
                let line = std::mem::replace(&mut self.buffer, rest);
                let descriptors = std::mem::take(&mut self.descriptors);
                return Ok(Some(Packet { line, descriptors }));
            }
            if self.buffer.len() >= MAX_MESSAGE_LEN || self.descriptors.len() > MAX_DESCRIPTORS {
                return Err(io::Error::other("a message is too long"));
            }
            searched = self.buffer.len();
            match self.read().await {
                Ok(0) if self.buffer.is_empty() => return Ok(None),
                Ok(0) => return Err(io::Error::other("a message is cut off")),
                Err(e) if e.kind() == ErrorKind::ConnectionReset => return Ok(None),
                Err(e) => return Err(e),
                Ok(_) => {}
            }
        }
    }

    /// Receives the next message; `None` if the other end is gone.
    ///
    /// # Errors
    ///
    /// If the message is malformed.
    pub(crate) async fn message(&mut self) -> Result<Option<Message>> {
        let what = || "cannot hear from the sandbox process".to_owned();
        match self.receive().await.explain(what)? {
            Some(packet) => serde_json::from_slice(&packet.line).map(Some).explain(what),
            None => Ok(None),
        }
    }

    async fn read(&mut self) -> io::Result<usize> {
        let mut bytes = [0; READ_LEN];
        let (length, descriptors) = self
            .socket
            .async_io(Interest::READABLE, || receive(self.socket.as_fd(), &mut bytes))
            .await?;
        self.buffer.extend(&bytes[..length]);
        self.descriptors.extend(descriptors);
        Ok(length)
    }

    /// Sends a message.
    pub(crate) async fn send(&self, message: &impl Serialize) -> io::Result<()> {
        self.send_with(message, &[]).await
    }

    /// Sends the only message of a new connection, whose buffer has room for it.
    pub(super) fn refuse(&self, message: &Message) {
        if let Ok(line) = line(message) {
            // The client sees the connection closed in any case.
            let _ = self.socket.try_write(&line);
        }
    }

    /// Sends a message with descriptors beside it.
    pub(crate) async fn send_with(
        &self,
        message: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let line = line(message)?;
        let mut bytes = &line[..];
        let mut packets = descriptors.chunks(MAX_PACKET);
        let mut descriptors = packets.next().unwrap_or_default();
        while !bytes.is_empty() {
            // A byte of the line for each packet of descriptors, and the rest with the last one.
            let length = if packets.len() > 0 { 1 } else { bytes.len() };
            let sent = self
                .socket
                .async_io(Interest::WRITABLE, || {
                    send(self.socket.as_fd(), &bytes[..length], descriptors)
                })
                .await?;
            bytes = &bytes[sent..];
            descriptors = packets.next().unwrap_or_default();
        }
        Ok(())
    }
}

fn send(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_PACKET))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("no space for the descriptors"));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)?)
}

fn receive(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_PACKET))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let mut parts = [IoSliceMut::new(bytes)];
    let received = rustix::net::recvmsg(socket, &mut parts, &mut control, flags)?;
    let descriptors = control.drain().filter_map(|item| match item {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let descriptors = descriptors.flatten().collect();
    // Set if this process has no room for a descriptor.
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other("descriptors are missing: their limit is reached"));
    }
    Ok((received.bytes, descriptors))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    fn pair() -> (Connection, Connection) {
        let (ours, theirs) = StdUnixStream::pair().unwrap();
        (Connection::new(ours).unwrap(), Connection::new(theirs).unwrap())
    }

    fn run<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
    }

    #[test]
    fn all_descriptors_arrive_with_the_line() {
        run(async {
            let (ours, mut theirs) = pair();
            let (null, zero) = (File::open("/dev/null").unwrap(), File::open("/dev/zero").unwrap());
            // More than one packet holds.
            let many = [vec![null.as_fd(); 2 * MAX_PACKET], vec![zero.as_fd()]].concat();
            ours.send_with(&"first", &many).await.unwrap();
            let Packet { line, descriptors } = theirs.receive().await.unwrap().unwrap();
            assert_eq!((&line[..], descriptors.len()), (&b"\"first\"\n"[..], many.len()));
            let last = rustix::fs::fstat(descriptors.last().unwrap()).unwrap();
            assert_eq!(last.st_rdev, rustix::fs::makedev(1, 5));
            ours.send(&"second").await.unwrap();
            drop(ours);
            let Packet { line, descriptors } = theirs.receive().await.unwrap().unwrap();
            assert_eq!((&line[..], descriptors.len()), (&b"\"second\"\n"[..], 0));
            assert!(theirs.receive().await.unwrap().is_none());
        });
    }

    #[test]
    fn a_cancelled_wait_loses_nothing() {
        run(async {
            let (ours, mut theirs) = pair();
            let sending = tokio::spawn(async move { ours.send(&"x".repeat(1 << 20)).await });
            let packet = loop {
                tokio::select! {
                    biased;
                    packet = theirs.receive() => break packet.unwrap().unwrap(),
                    () = tokio::task::yield_now() => {}
                }
            };
            assert_eq!(packet.line.len(), (1 << 20) + 3);
            sending.await.unwrap().unwrap();
        });
    }

    #[test]
    fn a_message_is_bounded_and_whole() {
        run(async {
            let (ours, mut theirs) = pair();
            let endless = async {
                let bytes = [b'x'; 4096];
                while ours.socket.writable().await.is_ok() {
                    match ours.socket.try_write(&bytes) {
                        Err(e) if e.kind() != ErrorKind::WouldBlock => return,
                        _ => {}
                    }
                }
            };
            tokio::select! {
                received = theirs.receive() => assert!(received.is_err()),
                () = endless => panic!("the reader is gone"),
            }
            let (ours, mut theirs) = pair();
            ours.socket.writable().await.unwrap();
            ours.socket.try_write(b"no end").unwrap();
            drop(ours);
            assert!(theirs.receive().await.is_err());
        });
    }
}

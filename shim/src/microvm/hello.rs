//! Connections that the guest makes to the host: the agent's hello, questions to the name server, and
//! connections to sockets of the host. The VMM hands them over through a socket.

use std::{
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    time::Duration,
};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};
use tokio::{
    io::{AsyncReadExt, unix::AsyncFd},
    net::UnixStream,
    time::sleep,
};

use isopod_protocol::{HOST_SOCKET_PORT, Hello, PROTOCOL_VERSION, READY_PORT, RESOLVER_PORT};

use crate::{
    descriptor::wait_for,
    error::{Error, Explain, Result},
    microvm::{dns_proxy::DnsProxy, host_sockets::HostSockets},
    text::printable,
};

/// Pause when memory has run out.
const PAUSE: Duration = Duration::from_millis(10);

/// Longest hello in bytes.
const MAX_HELLO_LEN: u64 = 4096;

/// Longest kernel release to repeat, in characters.
const MAX_RELEASE_LEN: usize = 64;

/// Connections from the guest to the host.
#[derive(Debug)]
pub(crate) struct GuestConnections {
    socket: AsyncFd<OwnedFd>,
}

impl GuestConnections {
    /// Takes over the socket whose other end the VMM has.
    pub(crate) fn new(socket: OwnedFd) -> Result<Self> {
        let socket = wait_for(socket).explain(|| "cannot wait for the guest".into())?;
        Ok(Self { socket })
    }

    /// Waits for the agent's hello and checks it. Never returns if the VMM ends first. Fails if the
    /// hello is malformed, or has another version of the protocol.
    pub(crate) async fn hello(&self) -> Result<Hello> {
        loop {
            match self.next().await.explain(|| "cannot receive from the VMM".into())? {
                None => std::future::pending().await,
                Some((READY_PORT, stream)) => return read_hello(stream).await,
                Some((port, _)) => {
                    log::debug!("the guest connected to port {port}, which is closed")
                }
            }
        }
    }

    /// Passes further connections of the guest on, by their ports. A connection is closed if the
    /// host has nothing for it.
    pub(crate) async fn serve(self, resolver: Option<DnsProxy>, sockets: HostSockets) {
        loop {
            match self.next().await {
                Ok(Some((port, stream))) => match (port, &resolver) {
                    (RESOLVER_PORT, Some(resolver)) => resolver.take(stream),
                    (HOST_SOCKET_PORT, _) => sockets.take(stream),
                    _ => {}
                },
                Ok(None) => return,
                Err(error) => {
                    log::warn!("the guest can connect to the host no more: {error}");
                    return;
                }
            }
        }
    }

    /// The next connection and its port; `None` when the VMM has closed its end. A connection is
    /// passed over if this process lacks a descriptor or memory for it. The guest sees it closed.
    async fn next(&self) -> io::Result<Option<(u32, UnixStream)>> {
        loop {
            let mut guard = self.socket.readable().await?;
            match guard.try_io(|socket| receive(socket.get_ref())) {
                Err(_) => {}
                // The memory may be there the next time.
                Ok(Err(e)) if e.raw_os_error() == Some(libc::ENOMEM) => sleep(PAUSE).await,
                Ok(Err(e)) => return Err(e),
                Ok(Ok(None)) => return Ok(None),
                Ok(Ok(Some((port, Some(fd))))) => {
                    let stream = StdUnixStream::from(fd);
                    let usable =
                        stream.set_nonblocking(true).and_then(|()| UnixStream::from_std(stream));
                    match usable {
                        Ok(stream) => return Ok(Some((port, stream))),
                        Err(e) => {
                            log::warn!("a connection of the guest to port {port} is closed: {e}")
                        }
                    }
                }
                Ok(Ok(Some((port, None)))) => log::warn!(
                    "a connection of the guest to port {port} is closed: descriptors have run out"
                ),
            }
        }
    }
}

/// Receives one message: a port as four bytes, and a descriptor.
fn receive(socket: &OwnedFd) -> io::Result<Option<(u32, Option<OwnedFd>)>> {
    let mut port = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut port)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
    )?;
    if message.bytes == 0 {
        return Ok(None);
    }
    if message.bytes != port.len() || message.flags.contains(ReturnFlags::TRUNC) {
        return Err(io::Error::other("the VMM announced a connection in an unknown form"));
    }
    let fd = control.drain().find_map(|item| match item {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok(Some((u32::from_le_bytes(port), fd)))
}

async fn read_hello(stream: UnixStream) -> Result<Hello> {
    let mut json = Vec::new();
    stream
        .take(MAX_HELLO_LEN)
        .read_to_end(&mut json)
        .await
        .explain(|| "cannot read the agent's hello".into())?;
    // The error does not repeat the content of the hello, which comes from the guest.
    let mut hello: Hello = serde_json::from_slice(&json)
        .map_err(|_| Error::new("the guest's hello is malformed: reinstall image and programs"))?;
    if hello.protocol != PROTOCOL_VERSION {
        return Err(Error::new(format!(
            "the guest image speaks protocol version {}, this isopod speaks {PROTOCOL_VERSION}: \
             install image and programs from one build",
            hello.protocol
        )));
    }
    hello.kernel = printable(&hello.kernel).chars().take(MAX_RELEASE_LEN).collect();
    Ok(hello)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{
        AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
        SocketType, sendmsg, socketpair,
    };
    use std::{io::Write, os::fd::AsFd};

    /// Sends a connection to `port` with the bytes `text`.
    fn announce(socket: &OwnedFd, port: &[u8], text: &[u8]) {
        let (ours, theirs) = StdUnixStream::pair().unwrap();
        (&ours).write_all(text).unwrap();
        let fds = [theirs.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let port = [io::IoSlice::new(port)];
        sendmsg(socket, &port, &mut control, SendFlags::empty()).unwrap();
    }

    fn hello(announcements: &[(&[u8], &[u8])]) -> Result<Hello> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        for (port, text) in announcements {
            announce(&theirs, port, text);
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { GuestConnections::new(ours).unwrap().hello().await })
    }

    const READY: &[u8] = &READY_PORT.to_le_bytes();

    #[test]
    fn the_hello_is_found_among_other_connections() {
        let line = format!(
            r#"{{"protocol":{PROTOCOL_VERSION},"kernel":"6.12\u0007","init_us":1,"ready_us":2,
                "memory_used_kib":3}}"#
        );
        let hello = hello(&[(&9u32.to_le_bytes(), b"x"), (READY, line.as_bytes())]).unwrap();
        assert_eq!((hello.kernel.as_str(), hello.ready_us), ("6.12 ", 2));
    }

    #[test]
    fn a_bad_hello_is_an_error() {
        for (port, text, expected) in [
            (READY, &b"nonsense"[..], "malformed"),
            (READY, &[b'a'; 10_000][..], "malformed"),
            (b"abc", b"", "unknown form"),
            (
                READY,
                br#"{"protocol":999,"kernel":"","init_us":1,"ready_us":2,"memory_used_kib":3}"#,
                "protocol version 999",
            ),
        ] {
            let error = hello(&[(port, text)]).unwrap_err();
            assert!(error.message.contains(expected), "{error}");
        }
    }
}

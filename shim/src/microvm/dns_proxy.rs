//! The engine's name server, for the guest.
//!
//! On networks of its users Docker serves names at an address of loopback in the container's
//! network namespace. This process is in that namespace, but the guest is not. So the container's
//! questions to that address come here, and are asked again from here.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpStream, UdpSocket, UnixStream},
    sync::Semaphore,
    time::timeout,
};

use isopod_protocol::{MAX_DATAGRAM, RESOLVE_DATAGRAM, RESOLVE_STREAM};

/// Most questions at a time. Further questions are dropped, as a network may drop them.
const MAX_QUESTIONS: usize = 64;

/// Longest time for a question from end to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// A proxy that passes the guest's questions on.
#[derive(Debug, Clone)]
pub(crate) struct DnsProxy {
    server: SocketAddr,
    questions: Arc<Semaphore>,
}

impl DnsProxy {
    /// Makes a proxy for the name server at `server`, in the network namespace of this process.
    pub(crate) fn new(server: SocketAddr) -> Self {
        Self { server, questions: Arc::new(Semaphore::new(MAX_QUESTIONS)) }
    }

    /// Takes over a connection that the guest has made for a question.
    pub(crate) fn take(&self, guest: UnixStream) {
        let Ok(permit) = Arc::clone(&self.questions).try_acquire_owned() else { return };
        let server = self.server;
        tokio::spawn(async move {
            // A question that fails or takes too long gets no answer: the guest sees the connection
            // end.
            let result = timeout(PATIENCE, ask(guest, server)).await;
            if let Ok(Err(e)) = result {
                log::debug!("a question to the name server at {server} was not answered: {e}");
            }
            drop(permit);
        });
    }
}

async fn ask(mut guest: UnixStream, server: SocketAddr) -> io::Result<()> {
    match guest.read_u8().await? {
        RESOLVE_DATAGRAM => {
            let mut datagram = vec![0; MAX_DATAGRAM];
            let length = usize::from(guest.read_u16().await?).min(MAX_DATAGRAM);
            guest.read_exact(&mut datagram[..length]).await?;
            let socket = UdpSocket::bind((server.ip(), 0)).await?;
            socket.connect(server).await?;
            socket.send(&datagram[..length]).await?;
            let length = socket.recv(&mut datagram).await?;
            guest.write_u16(u16::try_from(length).map_err(io::Error::other)?).await?;
            guest.write_all(&datagram[..length]).await
        }
        RESOLVE_STREAM => {
            let mut stream = TcpStream::connect(server).await?;
            copy_bidirectional(&mut guest, &mut stream).await.map(drop)
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

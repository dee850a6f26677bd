//! Stdio connections: the host opens one for each stream and begins it with an 8-byte token.
//!
//! The RPC that starts the process names the tokens. The host opens the connections first, but the
//! agent may accept call and connections in any order. So both meet in a table: unclaimed
//! connections, and calls whose connection has not arrived. Both halves are bounded in number and
//! in time.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use isopod_protocol::text::seconds;
use rustix::net::SocketFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::Instant;

use crate::error::{Context as _, Error, Result};
use crate::log::{log_error, log_warn};
use crate::syscall;

/// A connection, read and written without blocking.
pub(crate) type Connection = AsyncFd<OwnedFd>;

/// Most connections that no call has named yet. The oldest is dropped first.
const MAX_UNCLAIMED: usize = 256;

/// Longest wait of a connection for its call. The host calls as soon as the connections are open.
const UNCLAIMED_TIMEOUT: Duration = Duration::from_secs(60);

/// Most connections whose token is still being read.
const MAX_HEADERLESS: usize = 64;

/// Longest wait of a call for a connection that it names.
const CLAIM_TIMEOUT: Duration = Duration::from_secs(30);

/// Table in which connections meet the calls that name them.
#[derive(Default)]
pub(crate) struct Streams {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    /// Connections in the order of arrival.
    arrived: VecDeque<Unclaimed>,
    awaited: HashMap<u64, oneshot::Sender<Connection>>,
    /// True while [`Streams::expire`] is running.
    expiring: bool,
}

struct Unclaimed {
    token: u64,
    connection: Connection,
    at: Instant,
}

impl Streams {
    /// Accepts connections for as long as the agent lives.
    pub(crate) fn serve(self: &Arc<Self>, listener: OwnedFd) -> Result<()> {
        rustix::io::ioctl_fionbio(&listener, true).context(|| "listen for streams")?;
        let listener =
            syscall::watch(listener, Interest::READABLE).context(|| "listen for streams")?;
        let streams = Arc::clone(self);
        tokio::spawn(async move {
            if let Err(e) = streams.accept_all(&listener).await {
                log_error!("no longer accepting stdio streams: {e}");
            }
        });
        Ok(())
    }

    async fn accept_all(self: &Arc<Self>, listener: &AsyncFd<OwnedFd>) -> io::Result<()> {
        let headerless = Arc::new(Semaphore::new(MAX_HEADERLESS));
        loop {
            let Ok(permit) = Arc::clone(&headerless).acquire_owned().await else { return Ok(()) };
            let accepted = accept(listener).await;
            let both = Interest::READABLE | Interest::WRITABLE;
            let connection = match accepted.and_then(|fd| syscall::watch(fd, both)) {
                Ok(connection) => connection,
                Err(e) if is_transient(&e) => {
                    log_warn!("cannot accept a stdio stream: {e}");
                    // Descriptors or memory have run out: let other tasks release some first.
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                }
                Err(e) => return Err(e),
            };
            let streams = Arc::clone(self);
            tokio::spawn(async move {
                match read_token(&connection).await {
                    Ok(0) | Err(_) => {}
                    Ok(token) => streams.arrive(token, connection),
                }
                drop(permit);
            });
        }
    }

    fn arrive(self: &Arc<Self>, token: u64, connection: Connection) {
        let mut table = self.lock();
        let connection = match table.awaited.remove(&token) {
            Some(caller) => match caller.send(connection) {
                Ok(()) => return,
                // The call has just given up.
                Err(connection) => connection,
            },
            None => connection,
        };
        if table.arrived.len() >= MAX_UNCLAIMED {
            table.arrived.pop_front();
            log_warn!("dropped a stdio stream that no call named");
        }
        table.arrived.push_back(Unclaimed { token, connection, at: Instant::now() });
        if !table.expiring {
            table.expiring = true;
            tokio::spawn(Arc::clone(self).expire());
        }
    }

    /// Drops connections that no call names in time, until none is left.
    async fn expire(self: Arc<Self>) {
        while let Some(next) = self.drop_expired() {
            tokio::time::sleep_until(next).await;
        }
    }

    /// Drops expired connections and returns the time of the next expiry.
    fn drop_expired(&self) -> Option<Instant> {
        let mut table = self.lock();
        let now = Instant::now();
        while let Some(oldest) = table.arrived.front() {
            let end = oldest.at + UNCLAIMED_TIMEOUT;
            if end > now {
                return Some(end);
            }
            table.arrived.pop_front();
            log_warn!("dropped a stdio stream that no call named");
        }
        table.expiring = false;
        None
    }

    /// The connection with this token, or `None` for token 0. Waits for the connection for up to
    /// [`CLAIM_TIMEOUT`]; a second call for the same token fails.
    pub(crate) async fn claim(&self, token: u64) -> Result<Option<Connection>> {
        if token == 0 {
            return Ok(None);
        }
        let receiver = {
            let mut table = self.lock();
            if let Some(at) = table.arrived.iter().position(|unclaimed| unclaimed.token == token) {
                return Ok(table.arrived.remove(at).map(|unclaimed| unclaimed.connection));
            }
            if table.awaited.contains_key(&token) {
                return Err(Error::internal(format!("stdio stream {token:#x} is named twice")));
            }
            let (sender, receiver) = oneshot::channel();
            table.awaited.insert(token, sender);
            receiver
        };
        if let Ok(Ok(connection)) = tokio::time::timeout(CLAIM_TIMEOUT, receiver).await {
            return Ok(Some(connection));
        }
        self.lock().awaited.remove(&token);
        Err(Error::internal(format!(
            "stdio stream {token:#x} was not connected within {}",
            seconds(CLAIM_TIMEOUT)
        )))
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn accept(listener: &AsyncFd<OwnedFd>) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    loop {
        let mut guard = listener.readable().await?;
        if let Ok(accepted) = guard.try_io(|fd| Ok(rustix::net::accept_with(fd.get_ref(), flags)?))
        {
            return accepted;
        }
    }
}

/// Returns true for an error after which a retry may succeed: descriptors or memory have run out,
/// or the peer has gone.
pub(crate) fn is_transient(e: &io::Error) -> bool {
    let transient =
        [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM, libc::ECONNABORTED, libc::EINTR];
    e.raw_os_error().is_some_and(|errno| transient.contains(&errno))
}

/// A connection by vsock, for the event loop. Reads, writes and shutdowns are those of unix stream
/// sockets too.
pub(crate) fn in_event_loop(connection: OwnedFd) -> io::Result<tokio::net::UnixStream> {
    let connection = std::os::unix::net::UnixStream::from(connection);
    connection.set_nonblocking(true)?;
    tokio::net::UnixStream::from_std(connection)
}

async fn read_token(connection: &Connection) -> io::Result<u64> {
    let mut token = [0; 8];
    let mut filled = 0;
    while filled < token.len() {
        let mut guard = connection.readable().await?;
        match guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut token[filled..])?)) {
            Ok(Ok(0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(Ok(n)) => filled += n,
            Ok(Err(e)) => return Err(e),
            Err(_would_block) => {}
        }
    }
    Ok(u64::from_le_bytes(token))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    async fn served() -> (Arc<Streams>, std::path::PathBuf) {
        let name =
            format!("isopod-streams-{}-{:?}", std::process::id(), std::thread::current().id());
        let path = std::env::temp_dir().join(name);
        let streams = Arc::new(Streams::default());
        streams.serve(UnixListener::bind(&path).unwrap().into()).unwrap();
        (streams, path)
    }

    fn connect(path: &std::path::Path, token: u64) -> UnixStream {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.write_all(&token.to_le_bytes()).unwrap();
        stream
    }

    #[tokio::test(flavor = "current_thread")]
    async fn claims_before_and_after_arrival() {
        let (streams, path) = served().await;
        let mut early = connect(&path, 7);
        let claimed = streams.claim(7).await.unwrap().unwrap();
        rustix::io::write(claimed.get_ref(), b"x").unwrap();
        early.read_exact(&mut [0]).unwrap();

        let waiting = tokio::spawn({
            let streams = Arc::clone(&streams);
            async move { streams.claim(8).await.unwrap().is_some() }
        });
        tokio::task::yield_now().await;
        let _late = connect(&path, 8);
        assert!(waiting.await.unwrap());
        assert!(streams.claim(0).await.unwrap().is_none());
        std::fs::remove_file(path).unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn unclaimed_connections_are_bounded() {
        let (streams, path) = served().await;
        let mut first = connect(&path, 1);
        let mut rest = Vec::new();
        for token in 2..=(MAX_UNCLAIMED as u64 + 1) {
            rest.push(connect(&path, token));
            while streams.lock().arrived.back().is_none_or(|last| last.token != token) {
                tokio::task::yield_now().await;
            }
        }
        assert_eq!(streams.lock().arrived.len(), MAX_UNCLAIMED);
        assert_eq!(first.read(&mut [0]).unwrap(), 0);
        std::fs::remove_file(path).unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn unclaimed_connections_expire() {
        let (streams, path) = served().await;
        let mut late = connect(&path, 1);
        while streams.lock().arrived.is_empty() {
            tokio::task::yield_now().await;
        }
        assert!(streams.drop_expired().is_some());
        streams.lock().arrived[0].at -= UNCLAIMED_TIMEOUT;
        assert!(streams.drop_expired().is_none());
        assert_eq!(late.read(&mut [0]).unwrap(), 0);
        std::fs::remove_file(path).unwrap();
    }
}

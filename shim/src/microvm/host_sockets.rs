//! Unix sockets of the host in the microVM. The agent listens in their place, and passes each
//! connection on by vsock.
//!
//! A connection of the guest begins with the token of a container's mount. The guest names no path.

use std::{
    collections::HashMap,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::FileTypeExt,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use isopod_protocol::HOST_SOCKET_TOKEN_LEN;
use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags, openat2},
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with,
        sockopt::{Timeout, set_socket_timeout},
    },
};
use tokio::{
    io::{AsyncReadExt, copy_bidirectional},
    net::UnixStream,
    sync::{Semaphore, watch},
    time::timeout,
};

use crate::{bundle::HostSocket, error::Explain, event_loop::blocking};

/// Most connections at a time. Further ones are closed.
const MAX_CONNECTIONS: usize = 256;

/// Most connections at a time that the host's socket has not taken yet. Each takes a thread.
const MAX_CONNECTING: usize = 16;

/// Longest time for the guest to send the token, and for the host's socket to take the connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

type Token = [u8; HOST_SOCKET_TOKEN_LEN];

/// The sockets of the host that a microVM may connect to. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct HostSockets {
    table: Arc<Mutex<HashMap<Token, Target>>>,
    turns: Arc<Semaphore>,
    connecting: Arc<Semaphore>,
}

/// A socket that a container may connect to.
#[derive(Debug, Clone)]
struct Target {
    path: PathBuf,
    /// Without a sender once the container has ended.
    container: watch::Receiver<()>,
}

impl Default for HostSockets {
    fn default() -> Self {
        Self {
            table: Arc::default(),
            turns: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            connecting: Arc::new(Semaphore::new(MAX_CONNECTING)),
        }
    }
}

/// Sockets that a container may connect to. When this is dropped, the container's connections are
/// closed, whatever the guest says.
#[derive(Debug)]
pub(crate) struct SharedSockets {
    all: HostSockets,
    tokens: Vec<Token>,
    _container: watch::Sender<()>,
}

impl HostSockets {
    /// Lets a container connect to its sockets.
    pub(crate) fn share(&self, sockets: &[HostSocket]) -> SharedSockets {
        let (sender, container) = watch::channel(());
        let mut table = self.table();
        for socket in sockets {
            let target = Target { path: socket.path.clone(), container: container.clone() };
            table.insert(socket.token, target);
        }
        drop(table);
        let tokens = sockets.iter().map(|socket| socket.token).collect();
        SharedSockets { all: self.clone(), tokens, _container: sender }
    }

    /// Takes over a connection that the guest has made.
    pub(crate) fn take(&self, guest: UnixStream) {
        let Ok(turn) = Arc::clone(&self.turns).try_acquire_owned() else {
            // No warning: the guest decides how often this happens.
            return log::debug!(
                "a connection to a socket of the host is closed: there are {MAX_CONNECTIONS} already"
            );
        };
        let sockets = self.clone();
        tokio::spawn(async move {
            // The guest sees the connection end.
            if let Err(e) = sockets.pass_on(guest).await {
                log::debug!("a connection to a socket of the host has failed: {e}");
            }
            drop(turn);
        });
    }

    async fn pass_on(&self, mut guest: UnixStream) -> io::Result<()> {
        let connected = async {
            let mut token: Token = [0; HOST_SOCKET_TOKEN_LEN];
            guest.read_exact(&mut token).await?;
            let target = self.table().get(&token).cloned();
            let target = target.ok_or_else(|| io::Error::other("its token is unknown"))?;
            let host = self.connect(target.path).await?;
            Ok::<_, io::Error>((host, target.container))
        };
        let (mut host, mut container) = timeout(CONNECT_TIMEOUT, connected).await??;
        tokio::select! {
            // Either end may break the connection. The other end sees it closed then.
            copied = copy_bidirectional(&mut guest, &mut host) => copied.map(drop),
            _ = container.changed() => Ok(()),
        }
    }

    /// Connects to the socket that is at this path now: a daemon that starts again makes a new one.
    /// No symbolic link is followed, so nobody who writes to a directory on the way leads it
    /// elsewhere.
    async fn connect(&self, path: PathBuf) -> io::Result<UnixStream> {
        let turn = Arc::clone(&self.connecting).acquire_owned().await.map_err(io::Error::other)?;
        let what = path.display().to_string();
        let connected = blocking(move || {
            let connected = connect_now(&path).explain(|| what);
            // Not before the thread ends, even if nobody waits for the connection any more.
            drop(turn);
            connected
        });
        UnixStream::from_std(connected.await.map_err(|e| io::Error::other(e.message))?)
    }

    fn table(&self) -> MutexGuard<'_, HashMap<Token, Target>> {
        // Whoever panicked has left the table whole: each change is one call.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for SharedSockets {
    fn drop(&mut self) {
        let mut table = self.all.table();
        for token in &self.tokens {
            table.remove(token);
        }
    }
}

/// Blocks while the daemon's queue is full, as a connect on the host does. A connect without
/// blocking would fail then.
fn connect_now(path: &Path) -> io::Result<std::os::unix::net::UnixStream> {
    let socket = open(path)?;
    let address = SocketAddrUnix::new(format!("/proc/self/fd/{}", socket.as_raw_fd()))?;
    let stream = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&stream, Timeout::Send, Some(CONNECT_TIMEOUT))?;
    rustix::net::connect(&stream, &address)?;
    let stream = std::os::unix::net::UnixStream::from(stream);
    stream.set_nonblocking(true)?;
    Ok(stream)
}

/// Opens a socket by a path without symbolic links, for its inode alone.
fn open(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let opened = openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)?;
    let file = std::fs::File::from(opened);
    if !file.metadata()?.file_type().is_socket() {
        return Err(io::Error::other("it is no socket any more"));
    }
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{Read, Write},
        os::unix::{
            fs::symlink,
            net::{UnixListener, UnixStream as StdUnixStream},
        },
    };

    /// Sends `token` and `text` as the guest would, and returns what comes back.
    fn ask(sockets: &HostSockets, token: Token, text: &[u8]) -> Vec<u8> {
        let (mut ours, theirs) = StdUnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (token, text) = (token.to_vec(), text.to_vec());
        runtime.block_on(async {
            sockets.take(UnixStream::from_std(theirs).unwrap());
            let asked = tokio::task::spawn_blocking(move || {
                ours.write_all(&token).unwrap();
                // The other end may be closed already.
                let _ = ours.write_all(&text);
                let _ = ours.shutdown(std::net::Shutdown::Write);
                let mut answer = Vec::new();
                let _ = ours.read_to_end(&mut answer);
                answer
            });
            asked.await.unwrap()
        })
    }

    /// Answers one connection with its bytes, once they have ended.
    fn echo(path: &Path) -> std::thread::JoinHandle<()> {
        let listener = UnixListener::bind(path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut text = Vec::new();
            stream.read_to_end(&mut text).unwrap();
            stream.write_all(&text).unwrap();
        })
    }

    #[test]
    fn a_token_reaches_the_socket_that_is_there_now_and_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let path = root.join("socket");
        let sockets = HostSockets::default();
        let token = [7; HOST_SOCKET_TOKEN_LEN];
        let shared = sockets.share(&[HostSocket::new(0, path.clone(), token)]);
        for text in [&b"one"[..], b"two"] {
            let daemon = echo(&path);
            assert_eq!(ask(&sockets, token, text), text);
            daemon.join().unwrap();
            std::fs::remove_file(&path).unwrap();
        }
        assert_eq!(ask(&sockets, token, b"x"), b"", "there is no daemon");
        let other = UnixListener::bind(root.join("other")).unwrap();
        other.set_nonblocking(true).unwrap();
        symlink("other", &path).unwrap();
        assert_eq!(ask(&sockets, token, b"x"), b"", "a link");
        assert_eq!(ask(&sockets, [8; HOST_SOCKET_TOKEN_LEN], b"x"), b"", "an unknown token");
        drop(shared);
        std::fs::remove_file(&path).unwrap();
        let _listener = UnixListener::bind(&path).unwrap();
        assert_eq!(ask(&sockets, token, b"x"), b"", "a container that has ended");
        assert_eq!(other.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn connections_end_with_their_container() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let sockets = HostSockets::default();
        let token = [7; HOST_SOCKET_TOKEN_LEN];
        let shared = sockets.share(&[HostSocket::new(0, path, token)]);
        let (mut ours, theirs) = StdUnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            sockets.take(UnixStream::from_std(theirs).unwrap());
            let open = tokio::task::spawn_blocking(move || {
                ours.write_all(&[&token[..], b"x"].concat()).unwrap();
                let (mut daemon, _) = listener.accept().unwrap();
                daemon.read_exact(&mut [0]).unwrap();
                [ours, daemon]
            });
            let ends = open.await.unwrap();
            drop(shared);
            let read = tokio::task::spawn_blocking(move || {
                ends.map(|mut end| {
                    end.set_read_timeout(Some(CONNECT_TIMEOUT)).unwrap();
                    end.read(&mut [0]).unwrap()
                })
            });
            assert_eq!(read.await.unwrap(), [0, 0]);
        });
    }
}

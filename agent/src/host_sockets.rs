//! Unix sockets of the host, for containers that mount them.
//!
//! The agent listens in the host's place. Each connection becomes a connection to the host by vsock.
//! It begins with the socket's token. A container knows no token, so it reaches no socket that it
//! has not mounted.

use std::collections::HashMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use isopod_protocol::agent::HostSocket;
use isopod_protocol::{HOST_SOCKET_PORT, HOST_SOCKET_TOKEN_LEN, HOST_SOCKETS_DIR};
use tokio::io::{AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use vsock::{VMADDR_CID_HOST, VsockStream};

use crate::container::blocking;
use crate::error::{Context as _, Error, Result};
use crate::log::log_warn;
use crate::stream::{in_event_loop, is_transient};

/// Most connections at a time, of all containers. Others wait for their turn.
const MAX_CONNECTIONS: usize = 256;

/// Pause when descriptors or memory have run out, in which other connections may release some.
const PAUSE: Duration = Duration::from_millis(10);

/// Sockets of the host that are served, by the id of the container that has them.
pub(crate) struct HostSockets {
    served: Mutex<HashMap<String, Vec<Served>>>,
    turns: Arc<Semaphore>,
}

impl Default for HostSockets {
    fn default() -> Self {
        Self { served: Mutex::default(), turns: Arc::new(Semaphore::new(MAX_CONNECTIONS)) }
    }
}

/// A socket that is served until this is dropped.
struct Served {
    path: PathBuf,
    task: JoinHandle<()>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.task.abort();
        // The directory of a container without sockets is gone too.
        let _ = fs::remove_file(&self.path);
        let _ = self.path.parent().map(fs::remove_dir);
    }
}

impl HostSockets {
    /// Serves the sockets of a container. After an error the container keeps those served so far,
    /// until [`Self::leave`].
    pub(crate) fn join(&self, container_id: &str, sockets: &[HostSocket]) -> Result<()> {
        for socket in sockets {
            let served = self.serve(container_id, socket)?;
            let mut all = self.served.lock().unwrap_or_else(PoisonError::into_inner);
            all.entry(container_id.to_owned()).or_default().push(served);
        }
        Ok(())
    }

    /// Serves the sockets of a container no more. Connections end with the processes that have them.
    pub(crate) fn leave(&self, container_id: &str) {
        self.served.lock().unwrap_or_else(PoisonError::into_inner).remove(container_id);
    }

    fn serve(&self, container_id: &str, socket: &HostSocket) -> Result<Served> {
        let HostSocket { mount, mode, uid, gid, token, .. } = socket;
        if token.len() != HOST_SOCKET_TOKEN_LEN {
            return Err(Error::invalid("host_sockets.token", "of a wrong length"));
        }
        let directory = Path::new(HOST_SOCKETS_DIR).join(container_id);
        let path = directory.join(mount.to_string());
        let name = path.display().to_string();
        let what = || format!("listen at {name}");
        fs::create_dir_all(&directory).context(what)?;
        let listener = UnixListener::bind(&path).context(what)?;
        let (turns, token) = (Arc::clone(&self.turns), token.clone());
        let task = tokio::spawn(accept(listener, token, turns));
        let served = Served { path, task };
        // As on the host, so that the same users may connect.
        chown(&served.path, Some(*uid), Some(*gid)).context(what)?;
        fs::set_permissions(&served.path, Permissions::from_mode(mode & 0o7777)).context(what)?;
        Ok(served)
    }
}

async fn accept(listener: UnixListener, token: Vec<u8>, turns: Arc<Semaphore>) {
    loop {
        let guest = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(e) if is_transient(&e) => {
                sleep(PAUSE).await;
                continue;
            }
            Err(e) => return log_warn!("a socket of the host is served no more: {e}"),
        };
        // Never closed.
        let Ok(turn) = Arc::clone(&turns).acquire_owned().await else { return };
        let token = token.clone();
        tokio::spawn(async move {
            // A connection that the host does not take is closed.
            let _ = pass_on(guest, &token).await;
            drop(turn);
        });
    }
}

async fn pass_on(mut guest: UnixStream, token: &[u8]) -> Result<()> {
    let what = || "connect to a socket of the host";
    let host = blocking(move || {
        VsockStream::connect_with_cid_port(VMADDR_CID_HOST, HOST_SOCKET_PORT).context(what)
    })
    .await?;
    let mut host = in_event_loop(host.into()).context(what)?;
    host.write_all(token).await.context(what)?;
    copy_bidirectional(&mut guest, &mut host).await.map(drop).context(what)
}

//! The control socket of a sandbox process, and its connections.

use std::{collections::HashMap, time::Duration};

use tokio::{
    net::UnixListener,
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    control::{connection::Connection, message::Message, serve::Client},
    engine::Sandbox,
    error::{Error, Explain, Result},
    state::{CONTROL_SOCKET, StateDir},
};

/// Longest time for answers that are on their way out when the sandbox process ends.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Pause after a failed accept. Descriptors have run out, and the connection that is next stays the
/// next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Most connections of one process at a time: each costs a descriptor. A client needs one.
const MAX_CONNECTIONS: u32 = 16;

/// Listens on the control socket in `dir`.
pub(crate) fn listen(dir: &StateDir) -> Result<UnixListener> {
    UnixListener::bind(dir.short_path(CONTROL_SOCKET))
        .explain(|| format!("cannot listen at {}", dir.path().join(CONTROL_SOCKET).display()))
}

/// The control socket and its connections.
#[derive(Debug)]
pub(crate) struct Server {
    connections: JoinSet<()>,
    /// True once the sandbox has ended.
    closing: watch::Sender<bool>,
}

impl Server {
    /// Serves the connections to `listener`.
    pub(crate) fn start(listener: UnixListener, sandbox: Sandbox) -> Self {
        let (closing, closed) = watch::channel(false);
        let mut connections = JoinSet::new();
        connections.spawn(accept(listener, sandbox, closed));
        Self { connections, closing }
    }

    /// Leaves all further calls unanswered, and lets out the answers that are on their way. Clients
    /// that wait for the end of a container hear of it.
    pub(crate) async fn close(mut self) {
        self.closing.send_replace(true);
        let all = async { while self.connections.join_next().await.is_some() {} };
        let _ = timeout(FLUSH_TIMEOUT, all).await;
    }
}

async fn accept(listener: UnixListener, sandbox: Sandbox, mut closing: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    let mut clients = Clients::default();
    // One warning for each stretch of failures, not for each attempt.
    let mut failing = false;
    loop {
        tokio::select! {
            // A client that has connected before the end is to hear of the end.
            biased;
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    failing = false;
                    let connection = Connection::of(stream);
                    let Some(pid) = clients.admit(&connection) else { continue };
                    let client = Client::new(connection, sandbox.clone(), closing.clone());
                    connections.spawn(async move {
                        client.serve().await;
                        pid
                    });
                }
                Err(error) => {
                    if !failing {
                        log::warn!("cannot accept a connection to {CONTROL_SOCKET}: {error}");
                    }
                    failing = true;
                    tokio::select! {
                        () = sleep(ACCEPT_PAUSE) => {}
                        _ = closing.changed() => break,
                    }
                }
            },
            Some(ended) = connections.join_next() => {
                if let Ok(pid) = ended {
                    clients.gone(pid);
                }
            }
            _ = closing.changed() => break,
        }
    }
    while connections.join_next().await.is_some() {}
}

/// Number of open connections by the pid of the process that made them.
#[derive(Debug, Default)]
struct Clients(HashMap<i32, u32>);

impl Clients {
    /// Counts a connection. `None` if its process has too many connections.
    fn admit(&mut self, connection: &Connection) -> Option<i32> {
        // The pid is 0 for a process outside this pid namespace: all of these are one client.
        let pid = connection.peer()?;
        let open = self.0.entry(pid).or_default();
        if *open >= MAX_CONNECTIONS {
            let why = format!(
                "process {pid} has {open} connections to {CONTROL_SOCKET}, and gets no more"
            );
            connection.refuse(&Message::Failed(Error::new(why)));
            return None;
        }
        *open += 1;
        Some(pid)
    }

    /// Forgets a connection.
    fn gone(&mut self, pid: i32) {
        if let Some(open) = self.0.get_mut(&pid) {
            *open -= 1;
            if *open == 0 {
                self.0.remove(&pid);
            }
        }
    }
}

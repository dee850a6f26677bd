//! The end of a container, as its sandbox process reports it.

use std::{io::ErrorKind, time::Duration};

use tokio::{
    io::{AsyncWriteExt, BufReader},
    net::UnixStream,
    time::{sleep, timeout},
};

use crate::{
    control::message::{Ended, Message, Request, line, next_line},
    error::{Error, Explain, Result},
    state::{CONTROL_SOCKET, StateDir},
};

/// Pause before the next attempt to connect to a sandbox process whose queue of connections is
/// full.
const QUEUE_PAUSE: Duration = Duration::from_millis(10);

/// Longest time for a sandbox process to take a connection. One that is stopped takes none.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// A [`Request::Wait`] that a sandbox process answers when its container has ended.
///
/// It is sent before anything is started there. At the end nobody can ask any more, and there may
/// be nothing left to read. The caller has checked the versions of the sandbox.
pub(crate) struct ContainerEnd(BufReader<UnixStream>);

impl ContainerEnd {
    /// Asks the sandbox process behind `dir`. Fails if the sandbox process is ending or gone.
    pub(crate) async fn watch(dir: &StateDir) -> Result<Self> {
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
        let mut socket = timeout(CONNECT_TIMEOUT, connect).await.unwrap_or_else(|_| {
            let seconds = CONNECT_TIMEOUT.as_secs();
            Err(Error::new(format!("{}: it takes no connection within {seconds} seconds", what())))
        })?;
        let line = line(&Request::Wait).explain(what)?;
        socket.write_all(&line).await.explain(what)?;
        Ok(Self(BufReader::new(socket)))
    }

    /// Waits for the answer; `None` if the sandbox process ends without one.
    pub(crate) async fn heard(mut self) -> Option<Ended> {
        let line = next_line(&mut self.0, &mut Vec::new()).await.ok().flatten()?;
        match serde_json::from_slice(&line).ok()? {
            Message::Ended(ended) => Some(*ended),
            _ => None,
        }
    }
}

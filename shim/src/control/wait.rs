//! The end of a container, as its sandbox process reports it.

use std::{io::ErrorKind, time::Duration};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    time::sleep,
};

use crate::{
    control::message::{Ended, MAX_MESSAGE_LEN, Message, Request, line},
    error::{Explain, Result},
    state::{CONTROL_SOCKET, StateDir},
};

/// Pause before the next attempt to connect to a sandbox process whose queue of connections is
/// full.
const QUEUE_PAUSE: Duration = Duration::from_millis(10);

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
        let mut socket = loop {
            match UnixStream::connect(&path).await {
                // The queue of connections is full.
                Err(e) if e.kind() == ErrorKind::WouldBlock => sleep(QUEUE_PAUSE).await,
                result => break result.explain(what)?,
            }
        };
        let line = line(&Request::Wait).explain(what)?;
        socket.write_all(&line).await.explain(what)?;
        Ok(Self(BufReader::new(socket)))
    }

    /// Waits for the answer; `None` if the sandbox process ends without one.
    pub(crate) async fn heard(mut self) -> Option<Ended> {
        let mut line = Vec::new();
        let mut limited = (&mut self.0).take(MAX_MESSAGE_LEN as u64);
        limited.read_until(b'\n', &mut line).await.ok()?;
        match serde_json::from_slice(&line).ok()? {
            Message::Ended(ended) => Some(*ended),
            _ => None,
        }
    }
}

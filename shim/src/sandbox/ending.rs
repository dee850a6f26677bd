//! Hearing from a sandbox process how its container ended.

use std::{io::ErrorKind, time::Duration};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    time::sleep,
};

use super::control::{self, Ended, MAX_MESSAGE_LEN, Message, Request};
use crate::{
    error::{Explain, Result},
    state::{CONTROL_SOCKET, StateDir},
};

/// How long to wait before the next try to connect to a sandbox process that has too many who want to.
const QUEUE_PAUSE: Duration = Duration::from_millis(10);

/// A question to a sandbox process that it answers when its container has ended. Asked before anything
/// is started there: at the end nobody can ask any more, and nothing may be left to read. Who asks has
/// checked what the sandbox speaks.
pub(super) struct ContainerEnd(BufReader<UnixStream>);

impl ContainerEnd {
    /// Asks the sandbox process behind `dir`.
    ///
    /// # Errors
    ///
    /// If it is ending or gone.
    pub(super) async fn watch(dir: &StateDir) -> Result<Self> {
        let what = || "cannot talk to the sandbox process".to_owned();
        let path = dir.short_path(CONTROL_SOCKET);
        let mut socket = loop {
            match UnixStream::connect(&path).await {
                // The queue of those who want to connect is full. Whoever asks has a limit of time.
                Err(e) if e.kind() == ErrorKind::WouldBlock => sleep(QUEUE_PAUSE).await,
                result => break result.explain(what)?,
            }
        };
        let line = control::line(&Request::Wait).explain(what)?;
        socket.write_all(&line).await.explain(what)?;
        Ok(Self(BufReader::new(socket)))
    }

    /// Waits for the answer; `None` if the sandbox process ends without one.
    pub(super) async fn heard(mut self) -> Option<Ended> {
        let mut line = Vec::new();
        let mut limited = (&mut self.0).take(MAX_MESSAGE_LEN as u64);
        limited.read_until(b'\n', &mut line).await.ok()?;
        match serde_json::from_slice(&line).ok()? {
            Message::Ended(ended) => Some(*ended),
            _ => None,
        }
    }
}

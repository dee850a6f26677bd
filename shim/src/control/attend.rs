//! A client that stands for a process in the guest: it passes signals on, and waits for the end.

use std::os::fd::{BorrowedFd, OwnedFd};

use tokio::time::timeout;

use crate::{
    container_id::ContainerId,
    control::{
        client::{ANSWER_TIMEOUT, connect_to_sandbox},
        connection::Connection,
        message::{Call, Message, Verb},
    },
    engine::{Pod, Request},
    error::{Error, Result},
    signals::{Signals, WINCH},
    state::StateDir,
};

/// A connection to the sandbox process of a container, about one process in the guest.
#[derive(Debug)]
pub(crate) struct Attendance {
    container: ContainerId,
    connection: Connection,
}

/// A connection that keeps the microVM of a pod's holder, until it is dropped.
#[derive(Debug)]
pub(crate) struct Hold {
    _connection: Connection,
}

impl Hold {
    /// Keeps the microVM of the holder `pod`. `None` if the holder is ending or gone.
    ///
    /// # Errors
    ///
    /// If its sandbox process does not answer, or refuses.
    pub(crate) async fn take(pod: &Pod) -> Result<Option<Self>> {
        // A signal may have stopped it.
        pod.process.let_go_on();
        let Ok(dir) = StateDir::open_path(&pod.dir) else { return Ok(None) };
        let Ok(mut connection) = Connection::connect(&dir).await else { return Ok(None) };
        let call = Call { container: pod.sandbox.clone(), verb: Verb::Hold };
        if connection.send(&call).await.is_err() {
            return Ok(None);
        }
        let answer = timeout(ANSWER_TIMEOUT, connection.message()).await.map_err(|_| {
            let first = &pod.sandbox;
            Error::new(format!("the sandbox process of container {first} does not answer"))
        })?;
        match answer {
            Ok(Some(Message::Done)) => Ok(Some(Self { _connection: connection })),
            Ok(Some(Message::Failed(error))) => Err(error),
            // The connection breaks with the sandbox process.
            Ok(_) | Err(_) => Ok(None),
        }
    }
}

impl Attendance {
    /// Connects to the sandbox process of the container whose state directory is `dir`. The caller
    /// has checked the versions.
    ///
    /// # Errors
    ///
    /// If the sandbox process is ending or gone.
    pub(crate) async fn connect(dir: &StateDir, container: &ContainerId) -> Result<Self> {
        Ok(Self { container: container.clone(), connection: connect_to_sandbox(dir).await? })
    }

    /// Sends the call that makes the process, and waits until it is made. `None` if the container or
    /// its sandbox process is gone.
    ///
    /// # Errors
    ///
    /// If the sandbox process could not make it.
    pub(crate) async fn begin(
        &mut self,
        verb: Verb,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Option<()>> {
        let call = Call { container: self.container.clone(), verb };
        if let Err(error) = self.connection.send_with(&call, descriptors).await {
            log::debug!("cannot talk to the sandbox process: {error}");
            return Ok(None);
        }
        match self.connection.message().await? {
            Some(Message::Created) => Ok(Some(())),
            Some(Message::Failed(error)) => Err(error),
            Some(_) => Err(Error::new("the sandbox process said something unexpected")),
            None => Ok(None),
        }
    }

    /// Passes signals on until the process has ended, and returns the message of its end. `None` if
    /// the sandbox process is gone. `console` is the host's end of the terminal, if a change of its
    /// size is to reach the guest.
    ///
    /// # Errors
    ///
    /// If the answer is malformed.
    pub(crate) async fn attend(
        mut self,
        signals: &mut Signals,
        console: Option<&OwnedFd>,
    ) -> Result<Option<Message>> {
        // The terminal's size may have changed while the process was made.
        self.pass_on(WINCH, console).await;
        loop {
            tokio::select! {
                biased;
                message = self.connection.message() => return message,
                number = signals.next() => self.pass_on(number, console).await,
            }
        }
    }

    async fn pass_on(&self, number: u32, console: Option<&OwnedFd>) {
        let Some(request) = Request::of_signal(number, console) else { return };
        let call = Call { container: self.container.clone(), verb: Verb::PassOn(request) };
        if let Err(error) = self.connection.send(&call).await {
            // The next message is the end.
            log::debug!("cannot pass signal {number} on: {error}");
        }
    }
}

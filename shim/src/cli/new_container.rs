//! A container that a command has created: the sandbox process that owns it, and the wait for it.

use std::{
    process::{Child, ExitStatus},
    time::Duration,
};

use crate::{
    cgroup::CgroupPlan,
    control::{
        Message,
        connection::Connection,
        remains::remove,
        spawn::{self, Launched},
    },
    engine::{Record, hooks},
    error::{Error, Explain, Result},
    exit_text::exit_text,
    process_id::ProcessId,
    sandbox_process::Launch,
    signals::Signals,
    state::{StateDir, Status},
    terminal::Terminal,
    text::seconds,
};

/// Longest time for a sandbox process to end after it has said that it ends, or has lost the
/// command that launched it.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// A created container, and the sandbox process that owns it.
pub(super) struct NewContainer {
    pub(super) dir: StateDir,
    pub(super) terminal: Option<Terminal>,
    signals: Signals,
    child: Child,
    /// The connection to the sandbox process, which says when the container is created and how it
    /// has ended.
    launched: Connection,
}

impl NewContainer {
    /// Starts the sandbox process of a container, and waits until the container is created.
    pub(super) async fn launch(dir: StateDir, launch: &Launch, signals: Signals) -> Result<Self> {
        let mut container = Self::spawn(dir, launch, signals)?;
        match container.wait_created().await {
            Ok(()) => Ok(container),
            Err(error) => {
                container.abandon().await;
                Err(error)
            }
        }
    }

    /// Starts the sandbox process of a container. After a failure the state directory is removed.
    fn spawn(dir: StateDir, launch: &Launch, signals: Signals) -> Result<Self> {
        let unit = launch.cgroup.as_ref().and_then(CgroupPlan::unit);
        let launched =
            match spawn::spawn("sandbox", &launch.id, &dir, unit, &launch.preserved, launch) {
                Ok(launched) => launched,
                Err(error) => {
                    dir.remove()?;
                    return Err(error);
                }
            };
        // From here on the sandbox process must be the only holder of the lock: `adopt` takes no
        // lock.
        let adopted = StateDir::adopt(dir.path(), launch.made.clone())?;
        drop(dir);
        Self::new(adopted, launch.terminal.clone(), signals, launched)
    }

    /// The connection to the sandbox process, which lives on, and this process's signals.
    pub(super) fn into_parts(self) -> (Connection, Signals) {
        (self.launched, self.signals)
    }

    fn new(
        dir: StateDir,
        terminal: Option<Terminal>,
        signals: Signals,
        launched: Launched,
    ) -> Result<Self> {
        let Launched { child, socket } = launched;
        Ok(Self { dir, terminal, signals, child, launched: Connection::new(socket)? })
    }

    /// The sandbox process's pid. The kernel does not reuse it before [`Self::wait`] has returned.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the next message or signal. A message of `None` means that the sandbox process has
    /// ended.
    pub(super) async fn next(&mut self) -> Result<Next> {
        tokio::select! {
            message = self.launched.message() => message.map(Next::Message),
            number = self.signals.next() => Ok(Next::Signal(number)),
        }
    }

    /// Waits until the container is created. A signal that asks this process to end aborts the
    /// creation.
    async fn wait_created(&mut self) -> Result<()> {
        let message = tokio::select! {
            message = self.launched.message() => message?,
            number = self.signals.next_ending() => return Err(Error::new(format!(
                "interrupted by signal {number} while the container was created"
            ))),
        };
        match message {
            Some(Message::Created) => Ok(()),
            Some(Message::Failed(error)) => Err(error),
            Some(_) => Err(Error::new("the sandbox process said something unexpected")),
            None => Err(Error::new(format!(
                "the sandbox process ended before the container was created: {}",
                exit_text(self.wait()?)
            ))),
        }
    }

    /// Ends and removes a container after an error. The caller reports the error.
    pub(super) async fn abandon(self) {
        let Self { dir, mut child, launched, .. } = self;
        // A sandbox process that still creates the container ends when the connection closes. After
        // the creation it has to be told by SIGKILL, which it cannot miss.
        drop(launched);
        if Record::read(&dir).ok().flatten().is_some_and(|r| r.status != Status::Creating) {
            let _ = child.kill();
        }
        // The sandbox process runs its poststop hooks before it ends.
        let hooks = Record::read(&dir).ok().flatten().and_then(|record| record.hooks);
        let hooks =
            hooks.as_ref().and_then(|hooks| hooks.poststop().as_deref()).unwrap_or_default();
        let limit = hooks::time_limit(hooks).unwrap_or(END_TIMEOUT).saturating_add(END_TIMEOUT);
        let removed = match wait_within(&mut child, limit).and_then(|_| Record::read(&dir)) {
            Ok(record) => remove(&dir, record.as_ref()).await,
            Err(error) => Err(error),
        };
        if let Err(left) = removed {
            log::warn!("{left}");
        }
    }

    /// Waits for the end of the sandbox process, and kills it after `END_TIMEOUT`.
    pub(super) fn wait(&mut self) -> Result<ExitStatus> {
        wait_within(&mut self.child, END_TIMEOUT)
    }
}

/// Waits for the end of a sandbox process that is about to end. Kills it after `limit`, because a
/// signal may have stopped it.
fn wait_within(child: &mut Child, limit: Duration) -> Result<ExitStatus> {
    let process = i32::try_from(child.id()).ok().and_then(ProcessId::of);
    if process.is_some_and(|process| !process.wait(limit)) {
        log::warn!(
            "the sandbox process {} does not end within {}, so it is killed",
            child.id(),
            seconds(limit)
        );
        let _ = child.kill();
    }
    child.wait().explain(|| "cannot wait for the sandbox process".into())
}

/// The next event for a command that waits for its sandbox process.
pub(super) enum Next {
    /// The sandbox process has sent a message, or has ended.
    Message(Option<Message>),
    /// This process has got a signal.
    Signal(u32),
}

//! A start that is under way, beside the task that owns the container's state.

use std::time::Duration;

use tokio::{
    sync::oneshot,
    task::JoinHandle,
    time::{Instant, timeout_at},
};

use crate::{
    error::{Error, Result},
    event_loop::AbortOnDrop,
};

/// A step of a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// The guest starts the process.
    Process,
    /// The poststart hooks run, for as long as they may.
    Hooks,
}

/// A start that is under way, and the channel for its answer.
pub(crate) struct Starting {
    pub(crate) step: Step,
    task: AbortOnDrop<Result<()>>,
    answer: oneshot::Sender<Result<()>>,
    deadline: Option<Instant>,
}

impl Starting {
    pub(crate) fn new(
        step: Step,
        task: JoinHandle<Result<()>>,
        answer: oneshot::Sender<Result<()>>,
        limit: Option<Duration>,
    ) -> Self {
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        Self { step, task: AbortOnDrop(task), answer, deadline }
    }

    async fn wait(&mut self) -> Result<()> {
        let ended = match self.deadline {
            Some(deadline) => timeout_at(deadline, &mut self.task.0).await,
            None => Ok((&mut self.task.0).await),
        };
        match ended {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(Error::new("the start of the process was aborted")),
            Err(_) => Err(Error::new("the process was not started in time by the guest")),
        }
    }
}

/// Waits for the start that is under way. Never returns if there is none.
pub(crate) async fn finish(
    starting: &mut Option<Starting>,
) -> (Result<()>, Step, oneshot::Sender<Result<()>>) {
    let result = match starting.as_mut() {
        Some(starting) => starting.wait().await,
        None => std::future::pending().await,
    };
    match starting.take() {
        Some(Starting { step, answer, .. }) => (result, step, answer),
        None => std::future::pending().await,
    }
}

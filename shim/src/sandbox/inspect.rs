//! Looks at a container: questions to its agent that change nothing, from a process of their own, so
//! that no answer, however long it takes, holds up the one that owns the container.

use std::time::Duration;

use tokio::time::timeout;

use isopod_protocol::agent::ProcessInfo;

use super::agent::Agent;
use crate::{
    error::{Error, Explain, Result},
    state::{Id, StateDir},
};

/// How long the agent may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// The processes of a container, as its guest tells of them.
///
/// # Errors
///
/// If the microVM is ending or gone, or does not answer.
pub fn processes(dir: &StateDir, id: &Id) -> Result<Vec<ProcessInfo>> {
    ask(dir, id, async |agent| agent.processes().await)
}

fn ask<T>(dir: &StateDir, id: &Id, question: impl AsyncFnOnce(Agent) -> Result<T>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .explain(|| "cannot start the event loop".into())?;
    let answer = async {
        let agent = Agent::connect(dir, id, String::new()).await.map_err(|error| {
            log::debug!("{error}");
            Error::new(format!(
                "container {id} is not running: container not running (its microVM is ending or gone)"
            ))
        })?;
        question(agent).await
    };
    runtime.block_on(async {
        timeout(ANSWER_TIMEOUT, answer).await.unwrap_or_else(|_| {
            Err(Error::new(format!(
                "the guest of container {id} does not answer within {} seconds",
                ANSWER_TIMEOUT.as_secs()
            )))
        })
    })
}

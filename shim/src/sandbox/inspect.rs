//! Looks at a container: questions to its agent that change nothing, from a process of their own, so
//! that no answer, however long it takes, holds up the one that owns the container.

use std::{pin::pin, time::Duration};

use tokio::time::{MissedTickBehavior, interval_at, timeout};

use isopod_protocol::agent::{ContainerStats, ProcessInfo};

use super::agent::Agent;
use crate::{
    error::{Error, ErrorKind, Explain, Result},
    state::{Id, StateDir},
};

/// How long the agent may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a sandbox process may take to end after its microVM.
const END_TIMEOUT: Duration = Duration::from_secs(20);

/// The processes of a container, as its guest tells of them.
///
/// # Errors
///
/// If the microVM is ending or gone, or does not answer.
pub fn processes(dir: &StateDir, id: &Id) -> Result<Vec<ProcessInfo>> {
    run(async {
        let agent = connect(dir, id).await?;
        answer(id, agent.processes()).await
    })
}

/// What a container uses, as its guest tells of it.
///
/// # Errors
///
/// As [`processes`].
pub fn stats(dir: &StateDir, id: &Id) -> Result<ContainerStats> {
    run(async {
        let agent = connect(dir, id).await?;
        answer(id, agent.stats()).await
    })
}

/// What [`follow`] tells of.
#[derive(Debug)]
pub enum News {
    /// An interval has passed.
    Stats(Box<ContainerStats>),
    /// The kernel has killed processes of the container for its memory limit.
    Oom,
}

/// Tells of what happens in a container until it ends.
///
/// # Errors
///
/// As [`processes`], or that of `tell`, or that the microVM is lost.
pub fn follow(
    dir: &StateDir,
    id: &Id,
    interval: Duration,
    tell: impl FnMut(News) -> Result<()>,
) -> Result<()> {
    match run(watch(dir, id, interval, tell)) {
        Err(error) if error.kind == ErrorKind::VmLost && ended_in_order(dir) => Ok(()),
        result => result,
    }
}

async fn watch(
    dir: &StateDir,
    id: &Id,
    interval: Duration,
    mut tell: impl FnMut(News) -> Result<()>,
) -> Result<()> {
    let agent = connect(dir, id).await?;
    // No container has so many, so this returns at once.
    let (mut seen, mut ended) = answer(id, agent.wait_oom(u64::MAX)).await?;
    let mut ticks = interval_at(tokio::time::Instant::now() + interval, interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !ended {
        let mut oom = pin!(agent.wait_oom(seen));
        let killed = loop {
            tokio::select! {
                killed = &mut oom => break killed?,
                _ = ticks.tick() => {
                    let stats = answer(id, agent.stats()).await?;
                    tell(News::Stats(Box::new(stats)))?;
                }
            }
        };
        if killed.0 != seen {
            tell(News::Oom)?;
        }
        (seen, ended) = killed;
    }
    Ok(())
}

/// The connection to the agent breaks at the end of a container as it does when a microVM is lost; which
/// of them it was shows in the record when the sandbox process has ended.
fn ended_in_order(dir: &StateDir) -> bool {
    let Ok(Some(record)) = dir.record() else { return true };
    record.sandbox.wait(END_TIMEOUT);
    match dir.record() {
        Ok(Some(record)) => !record.is_lost(),
        // Deleted by now.
        _ => true,
    }
}

async fn connect(dir: &StateDir, id: &Id) -> Result<Agent> {
    dir.check_protocols()?;
    let connected = answer(id, Agent::connect(dir, id, String::new())).await;
    connected.map_err(|error| {
        log::debug!("{error}");
        Error::new(format!(
            "container {id} cannot be asked: container not running (its microVM is ending or gone)"
        ))
    })
}

async fn answer<T>(id: &Id, call: impl Future<Output = Result<T>>) -> Result<T> {
    timeout(ANSWER_TIMEOUT, call).await.unwrap_or_else(|_| {
        Err(Error::new(format!(
            "the guest of container {id} does not answer within {} seconds",
            ANSWER_TIMEOUT.as_secs()
        )))
    })
}

fn run<T>(look: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .explain(|| "cannot start the event loop".into())?
        .block_on(look)
}

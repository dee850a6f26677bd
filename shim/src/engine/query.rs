//! Questions to a container's agent that change nothing. They come from a process of their own. So
//! a slow answer never holds up the sandbox process, which owns the container.

use std::{pin::pin, time::Duration};

use tokio::time::{MissedTickBehavior, interval_at, timeout};

use isopod_protocol::agent::{ContainerStats, ProcessInfo};

use crate::{
    container_id::ContainerId,
    control::versions,
    engine::record::Record,
    error::{Error, ErrorKind, Result},
    event_loop::event_loop,
    microvm::agent::Agent,
    state::StateDir,
};

/// Longest time for an answer of the agent.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest time for a sandbox process to end after its microVM.
const END_TIMEOUT: Duration = Duration::from_secs(20);

/// Longest time between statistics that cannot be read and the news that the container has ended.
const LAST_NEWS_TIMEOUT: Duration = Duration::from_secs(5);

/// The processes of a container, as its guest reports them.
pub fn processes(dir: &StateDir, id: &ContainerId) -> Result<Vec<ProcessInfo>> {
    run(async {
        let agent = connect(dir, id).await?;
        answer(id, agent.processes()).await
    })
}

/// The resource use of a container, as its guest reports it.
pub fn stats(dir: &StateDir, id: &ContainerId) -> Result<ContainerStats> {
    run(async {
        let agent = connect(dir, id).await?;
        answer(id, agent.stats()).await
    })
}

/// An event that [`follow`] reports.
#[derive(Debug)]
pub enum News {
    /// The resource use, once for each interval.
    Stats(Box<ContainerStats>),
    /// The kernel has killed processes of the container for its memory limit.
    Oom,
}

/// Reports events of a container until it ends. Fails if `tell` fails, or if the microVM is lost.
pub fn follow(
    dir: &StateDir,
    id: &ContainerId,
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
    id: &ContainerId,
    interval: Duration,
    mut tell: impl FnMut(News) -> Result<()>,
) -> Result<()> {
    let agent = connect(dir, id).await?;
    // No container has so many kills, so this call returns at once.
    let (mut seen, mut ended) = answer(id, agent.wait_oom(u64::MAX)).await?;
    let mut ticks = interval_at(tokio::time::Instant::now() + interval, interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !ended {
        let mut oom = pin!(agent.wait_oom(seen));
        let killed = loop {
            tokio::select! {
                killed = &mut oom => break killed?,
                _ = ticks.tick() => match answer(id, agent.stats()).await {
                    Ok(stats) => tell(News::Stats(Box::new(stats)))?,
                    // The container's cgroup goes with it, perhaps while it is read.
                    Err(error) => match timeout(LAST_NEWS_TIMEOUT, &mut oom).await {
                        Ok(killed) => break killed?,
                        Err(_) => return Err(error),
                    },
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

/// Finds out whether the container ended in order. The connection to the agent breaks in that case
/// as it does when a microVM is lost. The record tells the two apart, once the sandbox process has
/// ended.
fn ended_in_order(dir: &StateDir) -> bool {
    let Ok(Some(record)) = Record::read(dir) else { return true };
    record.sandbox.wait(END_TIMEOUT);
    match Record::read(dir) {
        Ok(Some(record)) => !record.is_lost(),
        // Deleted by now.
        _ => true,
    }
}

async fn connect(dir: &StateDir, id: &ContainerId) -> Result<Agent> {
    versions::check(dir)?;
    let connected = answer(id, Agent::connect(dir, id, String::new())).await;
    connected.map_err(|error| {
        log::debug!("{error}");
        Error::new(format!(
            "container {id} cannot be asked: container not running (its microVM is ending or gone)"
        ))
    })
}

async fn answer<T>(id: &ContainerId, call: impl Future<Output = Result<T>>) -> Result<T> {
    timeout(ANSWER_TIMEOUT, call).await.unwrap_or_else(|_| {
        Err(Error::new(format!(
            "the guest of container {id} does not answer within {} seconds",
            ANSWER_TIMEOUT.as_secs()
        )))
    })
}

fn run<T>(look: impl Future<Output = Result<T>>) -> Result<T> {
    event_loop()?.block_on(look)
}

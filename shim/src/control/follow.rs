//! The events of a container, as a client follows them.

use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval_at, timeout};

use crate::{
    container_id::ContainerId,
    control::{
        client::connect_to_sandbox,
        connection::Connection,
        message::{Call, Message, Verb},
    },
    engine::Record,
    error::{Error, Result},
    event_loop::event_loop,
    state::{StateDir, Status, versions},
    stats::Stats,
    text::seconds,
};

/// Longest time for an answer of the sandbox process. Its guest has less.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(35);

/// Longest time for a sandbox process to end after its microVM.
const END_TIMEOUT: Duration = Duration::from_secs(20);

/// Longest time between statistics that cannot be read and the news that the container has ended.
const LAST_NEWS_TIMEOUT: Duration = Duration::from_secs(5);

/// An event of a container.
#[derive(Debug)]
pub(crate) enum News {
    /// The resource use, once for each interval.
    Stats(Box<Stats>),
    /// The kernel has killed processes of the container for its memory limit.
    Oom,
}

/// Reports events of a container until it ends. Fails if `tell` fails, or if the microVM is lost.
pub(crate) fn follow(
    dir: &StateDir,
    id: &ContainerId,
    interval: Duration,
    tell: impl FnMut(News) -> Result<()>,
) -> Result<()> {
    versions::check(dir)?;
    event_loop()?.block_on(watch(dir, id, interval, tell))
}

async fn watch(
    dir: &StateDir,
    id: &ContainerId,
    interval: Duration,
    mut tell: impl FnMut(News) -> Result<()>,
) -> Result<()> {
    // One connection for each kind of call: a call waits for the answer to the one before.
    let connected = async { Ok((connect(dir).await?, connect(dir).await?)) };
    let (mut kills, mut stats) = match connected.await {
        Ok(connected) => connected,
        Err(error) => return ended(dir, id, Some(error)),
    };
    // No container has so many kills, so this call returns at once.
    let first = kills.call(id, Verb::WaitOom { seen: u64::MAX }).await?;
    let Some(Message::Oom { count: mut seen, ended: false }) = first else {
        return ended(dir, id, None);
    };
    kills.ask(id, Verb::WaitOom { seen }).await;
    let mut ticks = interval_at(tokio::time::Instant::now() + interval, interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let news = tokio::select! {
            news = kills.0.message() => news?,
            _ = ticks.tick() => match stats.call(id, Verb::Stats).await {
                Ok(Some(Message::Stats(stats))) => {
                    tell(News::Stats(stats))?;
                    continue;
                }
                Ok(_) => None,
                // The container's cgroup goes with it, perhaps while it is read.
                Err(error) => match timeout(LAST_NEWS_TIMEOUT, kills.0.message()).await {
                    Ok(news) => news?,
                    Err(_) => return Err(error),
                },
            },
        };
        let (count, has_ended) = match news {
            Some(Message::Oom { count, ended }) => (count, ended),
            Some(Message::Failed(error)) => return ended(dir, id, Some(error)),
            _ => return ended(dir, id, None),
        };
        if count != seen {
            tell(News::Oom)?;
        }
        if has_ended {
            return Ok(());
        }
        seen = count;
        kills.ask(id, Verb::WaitOom { seen }).await;
    }
}

/// A connection for one kind of call.
struct Asker(Connection);

impl Asker {
    /// Sends a call. A sandbox process that is gone is noticed when its answer is read.
    async fn ask(&mut self, id: &ContainerId, verb: Verb) {
        let _ = self.0.send(&Call { container: id.clone(), verb }).await;
    }

    /// Sends a call and waits for the answer. `None` if the container or its sandbox is gone.
    async fn call(&mut self, id: &ContainerId, verb: Verb) -> Result<Option<Message>> {
        self.ask(id, verb).await;
        match timeout(ANSWER_TIMEOUT, self.0.message()).await {
            Ok(Ok(Some(Message::Failed(error)))) => Err(error),
            Ok(answer) => answer,
            Err(_) => Err(Error::new(format!(
                "the sandbox process of container {id} does not answer within {}",
                seconds(ANSWER_TIMEOUT)
            ))),
        }
    }
}

async fn connect(dir: &StateDir) -> Result<Asker> {
    connect_to_sandbox(dir).await.map(Asker)
}

/// Tells an end in order from the loss of a microVM, once the sandbox process has ended. The
/// connection breaks in both cases. `error` is what stood in the way, if the sandbox process goes on.
fn ended(dir: &StateDir, id: &ContainerId, error: Option<Error>) -> Result<()> {
    // Without a record it is deleted by now.
    let Ok(Some(record)) = Record::read(dir) else { return Ok(()) };
    let limit = if error.is_some() { LAST_NEWS_TIMEOUT } else { END_TIMEOUT };
    record.sandbox.wait(limit);
    match Record::read(dir) {
        Ok(Some(record)) if record.is_lost() => {
            let why = record.error.unwrap_or_else(|| "its sandbox process has ended".to_owned());
            Err(Error::new(format!("the microVM of container {id} is lost: {why}")))
        }
        Ok(Some(record)) if record.current_status() != Status::Stopped => {
            let what = format!("cannot follow container {id}: its sandbox process does not answer");
            Err(error.unwrap_or_else(|| Error::new(what)))
        }
        _ => Ok(()),
    }
}

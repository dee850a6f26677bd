//! Changes of a running container: pause, resume, update. They run one after the other, beside the
//! task that owns the state. So a container can still be killed while a change takes its time.

use std::{collections::VecDeque, time::Duration};

use oci_spec::runtime::LinuxResources;
use tokio::{
    sync::oneshot,
    task::JoinHandle,
    time::{Instant, timeout_at},
};

use crate::{
    bundle::{guest_processors, update_resources},
    cgroup::CpuLimits,
    engine::{
        record::Record,
        request::{Command, Request},
    },
    error::{Error, Result},
    event_loop::blocking,
    microvm::agent::Agent,
    state::{Exit, StateDir, Status},
    text::seconds,
};

/// Longest time for the guest to make a change. The guest gives itself less.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(20);

/// Changes that were asked for and are not done yet.
#[derive(Debug, Default)]
pub(crate) struct Updates {
    waiting: VecDeque<Command>,
    running: Option<Running>,
    /// The status that a paused container goes back to.
    before_pause: Option<Status>,
}

/// A change that the agent has been asked for.
#[derive(Debug)]
struct Running {
    task: JoinHandle<Result<()>>,
    deadline: Instant,
    effect: Effect,
    answer: oneshot::Sender<Result<()>>,
}

/// A change that the agent has made or refused.
#[derive(Debug)]
pub(crate) struct Finished {
    result: Result<()>,
    effect: Effect,
    answer: oneshot::Sender<Result<()>>,
}

/// The change of the record once the agent is done.
#[derive(Debug)]
enum Effect {
    Paused,
    Resumed,
    Updated(Box<LinuxResources>),
}

impl Updates {
    /// Adds a request for a change to those that wait.
    pub(crate) fn push(&mut self, command: Command) {
        self.waiting.push_back(command);
    }

    /// Returns true if nothing is being changed or about to be.
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.running.is_none()
    }

    /// Begins the next change, if none is under way.
    pub(crate) fn begin(&mut self, record: &Record, agent: &Agent, exit: Option<Exit>) {
        while self.running.is_none() {
            let Some(Command { request, answer }) = self.waiting.pop_front() else { return };
            match ask(record, agent.clone(), exit, request) {
                Ok((task, effect)) => {
                    let deadline = Instant::now() + CHANGE_TIMEOUT;
                    self.running = Some(Running { task, deadline, effect, answer });
                }
                Err(error) => {
                    // Fails if the client is gone.
                    let _ = answer.send(Err(error));
                }
            }
        }
    }

    /// Waits for the end of the change that is under way. Never returns if there is none. A
    /// cancelled call loses nothing.
    pub(crate) async fn finished(&mut self) -> Finished {
        let result = match self.running.as_mut() {
            Some(running) => match timeout_at(running.deadline, &mut running.task).await {
                Ok(Ok(result)) => result,
                Ok(Err(_)) => Err(Error::new("the change of the container was aborted")),
                Err(_) => Err(Error::new(format!(
                    "the guest does not answer within {}",
                    seconds(CHANGE_TIMEOUT)
                ))),
            },
            None => std::future::pending().await,
        };
        match self.running.take() {
            Some(Running { effect, answer, .. }) => Finished { result, effect, answer },
            None => std::future::pending().await,
        }
    }

    /// Records the effect of a change, and answers the client.
    pub(crate) fn settle(&mut self, record: &mut Record, dir: &StateDir, finished: Finished) {
        let Finished { result, effect, answer } = finished;
        if result.is_ok() {
            self.note(record, effect);
            record.save(dir);
        }
        let _ = answer.send(result);
    }

    fn note(&mut self, record: &mut Record, effect: Effect) {
        match effect {
            Effect::Paused => {
                self.before_pause = Some(record.status);
                record.status = Status::Paused;
            }
            Effect::Resumed => {
                record.status = self.before_pause.take().unwrap_or(Status::Running);
            }
            Effect::Updated(resources) => record.resources = *resources,
        }
    }
}

/// Asks the agent for a change, if the container's status permits it.
fn ask(
    record: &Record,
    agent: Agent,
    exit: Option<Exit>,
    request: Request,
) -> Result<(JoinHandle<Result<()>>, Effect)> {
    let paused = record.status == Status::Paused;
    match request {
        Request::Pause if exit.is_none() && !paused => {
            Ok((tokio::spawn(async move { agent.pause().await }), Effect::Paused))
        }
        Request::Resume if exit.is_none() && paused => {
            Ok((tokio::spawn(async move { agent.resume().await }), Effect::Resumed))
        }
        Request::Update { resources } if exit.is_none() => {
            let after = update_resources(&record.resources, &resources, record.vm)?;
            let mut guest = after.clone();
            guest_processors(&mut guest, record.vm.vcpus);
            let host = record.bounds_microvm().then(|| record.cgroup.clone()).flatten();
            let limits = CpuLimits::of(&after);
            let task = tokio::spawn(async move {
                let Some(cgroup) = host else { return agent.update(&guest).await };
                // systemd's client is waited for.
                let (cgroup, before) = blocking(move || {
                    let before = cgroup.limits_now(&limits);
                    cgroup.limit(&limits)?;
                    Ok((cgroup, before))
                })
                .await?;
                let updated = agent.update(&guest).await;
                if updated.is_err()
                    && let Err(error) = blocking(move || cgroup.limit(&before)).await
                {
                    log::warn!("{error}");
                }
                updated
            });
            Ok((task, Effect::Updated(Box::new(after))))
        }
        Request::Pause => Err(record.wrong_state("pause", exit)),
        Request::Resume => Err(record.wrong_state("resume", exit)),
        _ => Err(record.wrong_state("update", exit)),
    }
}

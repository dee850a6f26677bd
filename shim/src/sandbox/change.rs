//! Changes of a container that runs: pause, resume, update. One after the other, each beside the task
//! that owns the state, so that a container whose change takes its time can still be killed.

use std::{collections::VecDeque, time::Duration};

use oci_spec::runtime::LinuxResources;
use tokio::{
    sync::oneshot,
    task::JoinHandle,
    time::{Instant, timeout_at},
};

use super::{control::Request, lifecycle::Lifecycle, server::Command};
use crate::{
    bundle::{guest_processors, update_resources},
    cgroup::CpuLimits,
    error::{Error, Result},
    state::{Exit, Status},
};

/// How long the guest may take for one. It gives itself less.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(20);

/// Changes that were asked for and are not done.
#[derive(Debug, Default)]
pub(super) struct Changes {
    waiting: VecDeque<Command>,
    running: Option<Running>,
    /// What a paused container goes back to.
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
pub(super) struct Finished {
    result: Result<()>,
    effect: Effect,
    answer: oneshot::Sender<Result<()>>,
}

/// What becomes of the record when the agent is done.
#[derive(Debug)]
enum Effect {
    Paused,
    Resumed,
    Updated(Box<LinuxResources>),
}

impl Changes {
    /// Adds a request for a change to those that wait.
    pub(super) fn push(&mut self, command: Command) {
        self.waiting.push_back(command);
    }

    /// Nothing is being changed or about to be.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.running.is_none()
    }

    /// Begins the next change, if none is under way.
    pub(super) fn begin(&mut self, container: &Lifecycle, exit: Option<Exit>) {
        while self.running.is_none() {
            let Some(Command { request, answer }) = self.waiting.pop_front() else { return };
            match ask(container, exit, request) {
                Ok((task, effect)) => {
                    let deadline = Instant::now() + CHANGE_TIMEOUT;
                    self.running = Some(Running { task, deadline, effect, answer });
                }
                Err(error) => {
                    // Nobody waits for the answer any more, if this fails.
                    let _ = answer.send(Err(error));
                }
            }
        }
    }

    /// Waits for the end of the change that is under way. Never returns when there is none. Nothing is
    /// lost when it is cancelled.
    pub(super) async fn finished(&mut self) -> Finished {
        let result = match self.running.as_mut() {
            Some(running) => match timeout_at(running.deadline, &mut running.task).await {
                Ok(Ok(result)) => result,
                Ok(Err(_)) => Err(Error::new("the change was given up")),
                Err(_) => Err(Error::new(format!(
                    "the guest does not answer within {} seconds",
                    CHANGE_TIMEOUT.as_secs()
                ))),
            },
            None => std::future::pending().await,
        };
        match self.running.take() {
            Some(Running { effect, answer, .. }) => Finished { result, effect, answer },
            None => std::future::pending().await,
        }
    }

    /// Writes down what a change has done, and answers.
    pub(super) fn settle(&mut self, container: &mut Lifecycle, finished: Finished) {
        let Finished { result, effect, answer } = finished;
        if result.is_ok() {
            self.record(container, effect);
        }
        let _ = answer.send(result);
    }

    fn record(&mut self, container: &mut Lifecycle, effect: Effect) {
        let record = &mut container.record;
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
        container.save();
    }
}

/// Asks the agent, if the container is in the state for it.
fn ask(
    container: &Lifecycle,
    exit: Option<Exit>,
    request: Request,
) -> Result<(JoinHandle<Result<()>>, Effect)> {
    let agent = container.agent.clone();
    let record = &container.record;
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
                let before = cgroup.limits_now(&limits);
                cgroup.limit(&limits)?;
                let updated = agent.update(&guest).await;
                if updated.is_err()
                    && let Err(error) = cgroup.limit(&before)
                {
                    log::warn!("{error}");
                }
                updated
            });
            Ok((task, Effect::Updated(Box::new(after))))
        }
        Request::Pause => Err(container.wrong_state("pause", exit)),
        Request::Resume => Err(container.wrong_state("resume", exit)),
        _ => Err(container.wrong_state("update", exit)),
    }
}

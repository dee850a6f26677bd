//! The state machine of a container. One task owns the state; everything else asks this task.
//!
//! ```text
//!             start ok                process ended
//!   Created ───────────► Running ────────────────────► ending ──► Stopped
//!      │ process ended, start failed ───────────────────▲ ▲
//!      └──────────────────── microVM lost ──────────────┴─┘
//! ```
//!
//! Pause and resume lead from Created or Running to Paused and back ([`crate::engine::updates`]).
//!
//! "Ending" is not visible. The output of the process is still on its way, and then the guest is
//! shut down, or forgets a container that is not the first of its sandbox. Only then the state
//! becomes `stopped`.

use std::{pin::pin, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};

use crate::{
    clock,
    container_id::ContainerId,
    engine::{
        hooks::{self, Point},
        microvm::{Ending, Microvm},
        record::Record,
        request::{Command, Ended, Request},
        runtime_namespace::RuntimeNamespace,
        starting::{Starting, Step, finish},
        stdio::Relay,
        updates::Updates,
    },
    error::{Error, ErrorKind, Result},
    event_loop::AbortOnDrop,
    logger,
    microvm::{agent::Agent, disks::AttachedDisks, host_sockets::SharedSockets, share::Attached},
    signals::KILL,
    state::{Exit, StateDir, Status},
    text::seconds,
};

/// Longest time for the start of a process in the guest, file systems included.
pub(crate) const START_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest time for a container to die of SIGKILL, and for its output to be written. After that the
/// microVM is ended.
const DESTROY_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest time for a process to die of SIGKILL, if only that was asked for.
///
/// Only a guest that does not answer takes so long, and it must not outlive the kill. Together with
/// the end of the VMM this is within ten seconds, on a slow host too.
const KILL_TIMEOUT: Duration = Duration::from_secs(6);

/// Longest time for a reader to take the rest of the output, if the microVM was lost.
const LOSS_NOTICE_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest time for the guest to end and forget a container. Together with the time that a process
/// has to die, this is less than a forced deletion waits.
pub(crate) const DELETE_TIMEOUT: Duration = Duration::from_secs(15);

/// A created container, and all that ends with it.
pub(crate) struct Lifecycle {
    pub(crate) dir: Arc<StateDir>,
    pub(crate) record: Record,
    /// The namespaces and the cgroup for hooks, if there are hooks.
    pub(crate) origin: Option<RuntimeNamespace>,
    pub(crate) microvm: Arc<Microvm>,
    /// The first container of the sandbox, if this is another.
    pub(crate) first: Option<ContainerId>,
    pub(crate) attached: Attached,
    pub(crate) disks: AttachedDisks,
    /// Keeps the container's way to sockets of the host open.
    pub(crate) _sockets: SharedSockets,
    /// Keeps the guest's copies of volumes up to date.
    pub(crate) _volumes: Vec<AbortOnDrop<()>>,
    pub(crate) covers: AbortOnDrop<()>,
    pub(crate) agent: Agent,
    pub(crate) relay: Relay,
    /// Told the exit of the process as soon as it is known.
    pub(crate) tell_exit: watch::Sender<Option<Exit>>,
}

/// The loss of a container with the microVM of its pod, because of `error`.
pub(crate) fn lost_with(first: &ContainerId, error: Error) -> Error {
    let what = "the microVM of the pod has ended with its first container";
    let message = format!("{what}, {first}: {}", error.message);
    Error::with_kind(ErrorKind::VmLost, message).details(error.details)
}

/// The end of a container's process.
enum Outcome {
    /// The process ended.
    Exited(Exit),
    /// The process could not be started.
    NotStarted(Error),
    /// The microVM is gone or does not answer.
    Lost(Error),
}

impl Lifecycle {
    /// Owns the container until it has ended. With the first container of a sandbox, the microVM
    /// has ended too by then.
    pub(crate) async fn run(mut self, mut commands: mpsc::Receiver<Command>) -> Ended {
        let outcome = self.live(&mut commands).await;
        let lost = matches!(outcome, Outcome::Lost(_));
        let given_up = self.microvm.is_given_up();
        let ending = if lost { Ending::Lost } else { Ending::InOrder };
        let disks = std::mem::take(&mut self.disks);
        let leaving = async {
            match &self.first {
                None => self.microvm.shut_down(ending).await,
                Some(_) => {
                    self.leave().await;
                    self.microvm.detach_disks(disks).await;
                }
            }
        };
        answer_while(leaving, &mut commands, &self.record).await;
        if lost {
            // A guest that hangs ends no stream. What has come from it can still be read.
            self.relay.cut_off();
        } else {
            self.relay.end_inputs();
        }
        if let (Outcome::Lost(error), false) = (&outcome, given_up) {
            self.relay.say(format!("isopod: container {}: {error}\n", self.record.id));
            // The output of the process comes first, then the loss notice.
            let written = self.relay.finished(self.record.vm.memory_mib << 20);
            let _ = timeout(LOSS_NOTICE_TIMEOUT, written).await;
        }
        if self.first.is_none() {
            self.microvm.fill_timeline(&mut self.record.timeline);
        }
        self.record.timeline.ended = Some(clock::monotonic_us());
        let (exit, error) = match outcome {
            Outcome::Exited(exit) => (Some(exit), None),
            Outcome::NotStarted(error) => (None, Some(error)),
            // Whatever broke the connection: the exit status is unknown.
            Outcome::Lost(error) => (None, Some(Error { kind: ErrorKind::VmLost, ..error })),
        };
        let Self { dir, mut record, attached, covers, .. } = self;
        // An engine may unmount the sources once the container is known to have stopped.
        drop(covers);
        attached.detach().await;
        record.status = Status::Stopped;
        record.exit = exit;
        record.lost = lost;
        record.error = error.as_ref().map(|error| error.message.clone());
        record.save(&dir);
        Ended { exit, error, timeline: record.timeline }
    }

    /// Has the guest end and forget a container that is not the sandbox's first.
    async fn leave(&self) {
        let deleted = async {
            tokio::select! {
                deleted = timeout(DELETE_TIMEOUT, self.agent.delete_container()) => deleted,
                _ = self.microvm.ended() => Ok(Ok(())),
            }
        };
        match deleted.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) if error.kind == ErrorKind::VmLost => log::debug!("{error}"),
            Ok(Err(error)) => log::warn!("{error}"),
            Err(_) => log::warn!(
                "the guest did not end container {} within {}: it ends with the microVM of \
                 its pod",
                self.record.id,
                seconds(DELETE_TIMEOUT)
            ),
        }
    }

    /// Runs the container, from its creation to the end of the process.
    async fn live(&mut self, commands: &mut mpsc::Receiver<Command>) -> Outcome {
        let agent = self.agent.clone();
        let mut waiting = pin!(async move { agent.wait().await });
        let mut exit: Option<Exit> = None;
        let mut starting: Option<Starting> = None;
        let mut updates = Updates::default();
        let mut deadline: Option<Instant> = None;
        let mut killed: Option<Instant> = None;
        let mut readers = self.relay.readers();
        let memory = self.record.vm.memory_mib << 20;
        loop {
            // Hooks may ask for changes too.
            if starting.as_ref().is_none_or(|starting| starting.step == Step::Hooks) {
                updates.begin(&self.record, &self.agent, exit);
            }
            let give_up = async {
                // A client that kills waits for output that is read, a client that destroys does
                // not.
                match deadline.or(killed.filter(|_| exit.is_none())) {
                    Some(deadline) => sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                result = &mut waiting, if exit.is_none() => match result {
                    Ok((ended, _)) => {
                        self.record.timeline.exited = Some(clock::monotonic_us());
                        self.relay.process_ended();
                        self.tell_exit.send_replace(Some(ended));
                        exit = Some(ended);
                    }
                    Err(error) => {
                        let error = self.microvm.loss(error).await;
                        return self.lost(error);
                    }
                },
                result = finish(&mut starting) => {
                    let (result, step, answer) = result;
                    let failed = result.as_ref().err().cloned();
                    if failed.is_none() && step == Step::Process {
                        self.record.timeline.started = Some(clock::monotonic_us());
                        if self.first.is_none() {
                            // The VMM's own report may have come later than the container's creation.
                            self.microvm.fill_timeline(&mut self.record.timeline);
                        }
                        self.record.status = Status::Running;
                        self.record.save(&self.dir);
                        if hooks::any(Point::Poststart, &self.record) {
                            starting = Some(Starting::new(Step::Hooks, self.poststart(), answer, None));
                            continue;
                        }
                    }
                    // Fails if the client is gone.
                    let _ = answer.send(result);
                    match failed {
                        Some(error) if error.kind == ErrorKind::VmLost => {
                            return Outcome::Lost(error);
                        }
                        Some(error) => return Outcome::NotStarted(error),
                        None => {}
                    }
                }
                finished = updates.finished() => {
                    updates.settle(&mut self.record, &self.dir, finished);
                }
                () = self.relay.finished(memory), if exit.is_some() && starting.is_none() => {
                    if let Some(exit) = exit {
                        return Outcome::Exited(exit);
                    }
                }
                () = readers.stopped_reading(), if exit.is_some() && killed.is_some() => {
                    if let Some(exit) = exit {
                        return Outcome::Exited(exit);
                    }
                }
                end = self.microvm.ended() => return match exit {
                    Some(exit) => {
                        log::warn!("some of the output may be lost: {}", end.explain());
                        Outcome::Exited(exit)
                    }
                    None => self.lost(end.explain()),
                },
                () = give_up => return match exit {
                    Some(exit) => Outcome::Exited(exit),
                    None => Outcome::Lost(Error::with_kind(
                        ErrorKind::VmLost,
                        format!(
                            "the container did not end when it was killed, {}",
                            self.fate()
                        ),
                    )),
                },
                Some(Command { request, answer }) = commands.recv() => {
                    match request {
                        Request::Start
                            if starting.is_none()
                                && updates.is_empty()
                                && self.may_start(exit) =>
                        {
                            starting = Some(Starting::new(Step::Process, self.start(), answer, self.start_limit()));
                        }
                        Request::Start => {
                            let _ = answer.send(Err(self.record.wrong_state("start", exit)));
                        }
                        Request::Destroy => {
                            deadline.get_or_insert(Instant::now() + DESTROY_TIMEOUT);
                            let agent = self.agent.clone();
                            tokio::spawn(logger::inherit(async move {
                                if let Err(error) = agent.signal(KILL, false).await {
                                    log::debug!("{error}");
                                }
                            }));
                            let _ = answer.send(Ok(()));
                        }
                        Request::Pause | Request::Resume | Request::Update { .. } => {
                            updates.push(Command { request, answer });
                        }
                        Request::Kill { .. } if exit.is_some() => {
                            let _ = answer.send(Err(self.record.wrong_state("kill", exit)));
                        }
                        Request::Kill { signal: 0, .. } => {
                            let _ = answer.send(Ok(()));
                        }
                        Request::Kill { signal, all } => {
                            if signal == KILL {
                                killed.get_or_insert(Instant::now() + KILL_TIMEOUT);
                            }
                            let agent = self.agent.clone();
                            tokio::spawn(async move {
                                let sent = match agent.signal(signal, all).await {
                                    // The process has ended with its microVM.
                                    Err(error)
                                        if signal == KILL
                                            && error.kind == ErrorKind::VmLost =>
                                    {
                                        Ok(())
                                    }
                                    sent => sent,
                                };
                                let _ = answer.send(sent);
                            });
                        }
                        Request::Resize { size } => {
                            let agent = self.agent.clone();
                            tokio::spawn(async move {
                                let _ = answer.send(agent.resize(size).await);
                            });
                        }
                    }
                }
            }
        }
    }

    /// Outcome of a container that is not heard of any more. If the sandbox's first container has
    /// ended in order, all processes were killed with it.
    fn lost(&self, error: Error) -> Outcome {
        match &self.first {
            Some(_) if self.microvm.ends_in_order() => Outcome::Exited(Exit::KILLED),
            Some(first) => Outcome::Lost(lost_with(first, error)),
            None => Outcome::Lost(error),
        }
    }

    /// The fate of a container that did not end when it was killed: part of an error text.
    fn fate(&self) -> &'static str {
        match self.first {
            None => "so its microVM was ended",
            Some(_) => "and is left to end with the microVM of its pod",
        }
    }

    fn may_start(&self, exit: Option<Exit>) -> bool {
        exit.is_none() && self.record.status == Status::Created
    }

    /// Has the agent start the process. This runs beside the task that owns the state, so that a
    /// container whose start hangs can still be killed.
    ///
    /// An engine may have added the container's network only now.
    fn start(&self) -> JoinHandle<Result<()>> {
        let (agent, first) = (self.agent.clone(), self.first.is_none());
        let microvm = Arc::clone(&self.microvm);
        tokio::spawn(async move {
            if first && let Some(network) = microvm.complete_network().await? {
                agent.setup_network(network).await?;
            }
            agent.start_container().await
        })
    }

    /// Longest time for the start; `None` if a startContainer hook may take for ever.
    fn start_limit(&self) -> Option<Duration> {
        let hooks = self.record.hooks.as_ref().and_then(|h| h.start_container().as_deref());
        hooks::time_limit(hooks.unwrap_or_default())?.checked_add(START_TIMEOUT)
    }

    /// Runs the poststart hooks, also beside the task that owns the state.
    fn poststart(&self) -> JoinHandle<Result<()>> {
        let (record, origin) = (self.record.clone(), self.origin.clone());
        tokio::spawn(async move { hooks::run(Point::Poststart, &record, origin.as_ref()).await })
    }
}

/// Answers requests while the container is ending, so that nobody takes a slow end for a sandbox
/// process that has stopped.
async fn answer_while(
    ending: impl Future<Output = ()>,
    commands: &mut mpsc::Receiver<Command>,
    record: &Record,
) {
    let mut ending = pin!(ending);
    loop {
        tokio::select! {
            biased;
            () = &mut ending => return,
            Some(Command { request, answer }) = commands.recv() => {
                let verb = match request {
                    Request::Kill { signal: 0, .. } | Request::Destroy => {
                        let _ = answer.send(Ok(()));
                        continue;
                    }
                    Request::Start => "start",
                    Request::Kill { .. } => "kill",
                    Request::Pause => "pause",
                    Request::Resume => "resume",
                    Request::Update { .. } => "update",
                    Request::Resize { .. } => "resize",
                };
                let _ = answer.send(Err(record.not_running(verb)));
            }
        }
    }
}

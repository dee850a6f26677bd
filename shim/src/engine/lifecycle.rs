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
//! shut down. The state becomes `stopped` only when the VMM has ended.

use std::{pin::pin, time::Duration};

use tokio::{
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};

use crate::{
    clock,
    control::{
        Ended, Request,
        server::{Command, Server},
    },
    engine::{
        guest_process::GuestProcess,
        hooks::{self, Point, RuntimeNamespace},
        microvm::{Microvm, loss},
        record::Record,
        starting::{Starting, Step, finish},
        stdio::Relay,
        updates::Updates,
    },
    error::{EXIT_VM_LOST, Error, ErrorKind, Result},
    microvm::share::Share,
    network::Network,
    signals::{self, Signals, WINCH},
    state::{CONTROL_SOCKET, Exit, StateDir, Status, VSOCK_SOCKET},
    timeline::Timeline,
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

/// A created container.
pub(crate) struct Lifecycle {
    pub(crate) dir: StateDir,
    pub(crate) record: Record,
    /// The namespaces and the cgroup for hooks, if there are hooks.
    pub(crate) origin: Option<RuntimeNamespace>,
    pub(crate) microvm: Microvm,
    pub(crate) network: Network,
    pub(crate) share: Option<Share>,
    pub(crate) process: GuestProcess,
    pub(crate) relay: Relay,
    pub(crate) timeline: Timeline,
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
    /// Owns the container until it has ended and the microVM has ended too. Returns the exit status
    /// of this process.
    pub(crate) async fn run(mut self, mut server: Server, mut signals: Signals) -> u8 {
        let outcome = self.live(&mut server, &mut signals).await;
        let lost = matches!(outcome, Outcome::Lost(_));
        self.microvm.leave(&self.process.agent, lost).await;
        if let Outcome::Lost(error) = &outcome {
            self.relay.say(format!("isopod: container {}: {error}\n", self.record.id));
            // The output of the process comes first, then the loss notice.
            let written = self.relay.finished(self.record.vm.memory_mib << 20);
            let _ = timeout(LOSS_NOTICE_TIMEOUT, written).await;
        }
        self.microvm.fill_timeline(&mut self.timeline);
        self.timeline.ended = Some(clock::monotonic_us());
        let (exit, error, code) = match outcome {
            Outcome::Exited(exit) => (Some(exit), None, exit.status),
            Outcome::NotStarted(error) => {
                let code = error.exit_code();
                (None, Some(error), code)
            }
            Outcome::Lost(error) => (None, Some(error), EXIT_VM_LOST),
        };
        if exit.is_some_and(|exit| exit.oom_killed) {
            log::warn!(
                "container {}: the kernel killed a process of it: it went over its memory limit",
                self.record.id
            );
        }
        // The VMM needs none of these any more.
        self.network.disconnect();
        self.share = None;
        self.dir.remove_file(CONTROL_SOCKET);
        self.dir.remove_file(VSOCK_SOCKET);
        self.record.status = Status::Stopped;
        self.record.exit = exit;
        self.record.lost = lost;
        self.record.error = error.as_ref().map(|error| error.message.clone());
        self.record.save(&self.dir);
        let ended = Ended { exit, error: error.clone(), timeline: self.timeline };
        let heard = server.close(ended).await;
        if let Some(error) = error.filter(|_| !heard) {
            log::error!("container {}: {error}", self.record.id);
        }
        code
    }

    /// Runs the container, from its creation to the end of the process.
    async fn live(&mut self, server: &mut Server, signals: &mut Signals) -> Outcome {
        let agent = self.process.agent.clone();
        let mut waiting = pin!(async move { agent.wait().await });
        let mut exit: Option<Exit> = None;
        let mut starting: Option<Starting> = None;
        let mut updates = Updates::default();
        let mut deadline: Option<Instant> = None;
        let mut killed: Option<Instant> = None;
        let memory = self.record.vm.memory_mib << 20;
        // The terminal's size may have changed while the container was created.
        self.process.pass_on(WINCH);
        loop {
            // Hooks may ask for changes too.
            if starting.as_ref().is_none_or(|starting| starting.step == Step::Hooks) {
                updates.begin(&self.record, &self.process.agent, exit);
            }
            let give_up = async {
                // A client that kills waits for the output, a client that destroys does not.
                match deadline.or(killed.filter(|_| exit.is_none())) {
                    Some(deadline) => sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                result = &mut waiting, if exit.is_none() => match result {
                    Ok(ended) => {
                        self.timeline.exited = Some(clock::monotonic_us());
                        self.relay.process_ended();
                        exit = Some(ended);
                    }
                    Err(error) => {
                        let error = loss(&self.microvm, error).await;
                        return self.lost(error).await;
                    }
                },
                result = finish(&mut starting) => {
                    let (result, step, answer) = result;
                    let failed = result.as_ref().err().cloned();
                    if failed.is_none() && step == Step::Process {
                        self.timeline.started = Some(clock::monotonic_us());
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
                end = self.microvm.ended() => return match exit {
                    Some(exit) => {
                        log::warn!("some of the output may be lost: {}", end.explain());
                        Outcome::Exited(exit)
                    }
                    None => self.lost(end.explain()).await,
                },
                () = give_up => return match exit {
                    Some(exit) => Outcome::Exited(exit),
                    None => Outcome::Lost(Error::with_kind(
                        ErrorKind::VmLost,
                        format!(
                            "the container did not end when it was killed, {}",
                            self.microvm.fate()
                        ),
                    )),
                },
                command = server.next() => {
                    let Command { request, answer } = command;
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
                            self.process.pass_on(signals::KILL);
                            let _ = answer.send(Ok(()));
                        }
                        // The server answers this request when it closes.
                        Request::Wait => {}
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
                            if signal == signals::KILL {
                                killed.get_or_insert(Instant::now() + KILL_TIMEOUT);
                            }
                            let agent = self.process.agent.clone();
                            tokio::spawn(async move {
                                let sent = match agent.signal(signal, all).await {
                                    // The process has ended with its microVM.
                                    Err(error)
                                        if signal == signals::KILL
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
                            let agent = self.process.agent.clone();
                            tokio::spawn(async move {
                                let _ = answer.send(agent.resize(size).await);
                            });
                        }
                    }
                }
                number = signals.next() => self.process.pass_on(number),
            }
        }
    }

    /// Outcome of a container that is not heard of any more.
    async fn lost(&self, error: Error) -> Outcome {
        match self.microvm.exit().await {
            Some(exit) => Outcome::Exited(exit),
            None => Outcome::Lost(error),
        }
    }

    fn may_start(&self, exit: Option<Exit>) -> bool {
        exit.is_none() && self.record.status == Status::Created
    }

    /// Has the agent start the process. This runs beside the task that owns the state, so that a
    /// container whose start hangs can still be killed.
    ///
    /// An engine may have added the container's network only now.
    fn start(&mut self) -> JoinHandle<Result<()>> {
        let (agent, network) = (self.process.agent.clone(), self.network.complete());
        tokio::spawn(async move {
            if let Some(network) = network? {
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

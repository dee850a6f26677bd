//! A further process in a running container.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use oci_spec::runtime::Process as ProcessSpec;
use serde::{Deserialize, Serialize};
use tokio::{
    runtime::Handle,
    sync::{Notify, oneshot, watch},
    time::timeout,
};

use crate::{
    engine::{
        container::Container,
        lifecycle::START_TIMEOUT,
        microvm::Microvm,
        stdio::{Io, Relay},
    },
    error::{Error, ErrorKind, Result},
    logger,
    microvm::agent::Agent,
    random::random_u64,
    signals::{KILL, is_ending},
    state::Exit,
    terminal::Size,
};

/// Longest time for the guest to kill a process that nobody wants any more.
const DELETE_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest time for the container's end to be known, once its processes are gone.
const END_TIMEOUT: Duration = Duration::from_secs(20);

/// A process to run in a container, beside its streams.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ExecSpec {
    /// The process.
    pub process: ProcessSpec,
    /// Path of the process's cgroup in the guest, below the container's own cgroup.
    pub cgroup: Option<String>,
    /// True if its end is known once everything is passed on that the process can have written.
    /// Otherwise all output is passed on to its end, as with runc: other processes may have it too.
    pub detached: bool,
}

/// A process in a container. Dropping it kills the process.
pub(crate) struct Exec {
    agent: Agent,
    event_loop: Handle,
    exit: oneshot::Receiver<Result<Exit>>,
    /// The exit of the process, once it is known. Its output may still be on its way.
    ended: watch::Receiver<Option<Exit>>,
    interrupt: Arc<Notify>,
    killed: Arc<AtomicBool>,
    /// Dropped with this: the task then knows that nobody wants the process any more.
    _wanted: oneshot::Sender<()>,
}

impl Container {
    /// Runs a further process. Returns once it has been started. Dropping the future kills the
    /// process.
    ///
    /// # Errors
    ///
    /// If the process cannot be started, or the container is ending.
    pub(crate) async fn exec(&self, spec: ExecSpec, io: Io) -> Result<Exec> {
        let agent = self.agent.of_process(format!("exec-{:016x}", random_u64()?));
        let (tell_started, started) = oneshot::channel();
        let (tell_exit, exit) = oneshot::channel();
        let (wanted, given_up) = oneshot::channel();
        let (tell_ended, ended) = watch::channel(None);
        let exec = Exec {
            agent: agent.clone(),
            event_loop: self.microvm.event_loop.clone(),
            exit,
            ended,
            interrupt: Arc::default(),
            killed: Arc::default(),
            _wanted: wanted,
        };
        let task = Task {
            container: self.clone(),
            agent,
            detached: spec.detached,
            ended: tell_ended,
            interrupt: Arc::clone(&exec.interrupt),
            killed: Arc::clone(&exec.killed),
            _busy: Busy::of(&self.microvm),
        };
        let (id, run) = (self.id.clone(), task.run(spec, io, tell_started, tell_exit, given_up));
        self.microvm.event_loop.spawn(async move { logger::about(id.as_str(), run).await });
        match timeout(START_TIMEOUT, started).await {
            Ok(Ok(Ok(()))) => Ok(exec),
            Ok(Ok(Err(error))) => Err(error),
            Ok(Err(_)) => Err(Error::new("the start of the process was aborted")),
            Err(_) => Err(Error::new("the process was not started in time by the guest")),
        }
    }
}

impl Exec {
    /// Passes a signal on to the process. A task of its own waits for the answer. If the process
    /// has ended, a signal that asks to end ends the wait for the rest of its output.
    pub(crate) fn signal(&self, number: u32) {
        if self.ended.borrow().is_some() {
            if is_ending(number) {
                self.interrupt.notify_one();
            }
            return;
        }
        let agent = self.agent.clone();
        self.event_loop.spawn(logger::inherit(async move {
            if let Err(error) = agent.signal(number, false).await {
                log::debug!("{error}");
            }
        }));
    }

    /// The means to reach the process in the guest, whoever waits for it.
    pub(crate) fn control(&self) -> ExecControl {
        ExecControl { agent: self.agent.clone(), killed: Arc::clone(&self.killed) }
    }

    /// A receiver of the exit of the process, whose output may still be on its way. It is closed if
    /// the exit status is unknown.
    pub(crate) fn exit(&self) -> watch::Receiver<Option<Exit>> {
        self.ended.clone()
    }

    /// Gives the process's terminal a new size.
    pub(crate) fn resize(&self, size: Size) {
        let agent = self.agent.clone();
        self.event_loop.spawn(logger::inherit(async move {
            if let Err(error) = agent.resize(size).await {
                log::debug!("{error}");
            }
        }));
    }

    /// Waits for the end of the process and of its output. A cancelled wait can be repeated.
    ///
    /// # Errors
    ///
    /// If the microVM is lost: the exit status is unknown then.
    pub(crate) async fn wait(&mut self) -> Result<Exit> {
        let lost = |_| Err(Error::with_kind(ErrorKind::VmLost, "the sandbox process is ending"));
        (&mut self.exit).await.unwrap_or_else(lost)
    }

    /// The exit without the rest of the output, for a container that has ended.
    ///
    /// # Errors
    ///
    /// If the microVM was lost: the exit status is unknown then.
    pub(crate) async fn last_exit(&self, container: &Container) -> Result<Exit> {
        let ended = *self.ended.borrow();
        match ended {
            Some(exit) => Ok(exit),
            None => exit_with_container(container, None).await,
        }
    }
}

/// The means to reach a process in the guest. It keeps nothing alive.
#[derive(Clone)]
pub(crate) struct ExecControl {
    agent: Agent,
    killed: Arc<AtomicBool>,
}

impl ExecControl {
    /// Sends a signal to the process.
    ///
    /// # Errors
    ///
    /// If the process has ended, or the guest refuses.
    pub(crate) async fn kill(&self, number: u32) -> Result<()> {
        // First, because the end may be known before the answer is.
        self.killed.fetch_or(number == KILL, Ordering::Relaxed);
        self.agent.signal(number, false).await
    }

    /// Gives the process's terminal a new size.
    ///
    /// # Errors
    ///
    /// If the process has ended, or has no terminal.
    pub(crate) async fn resize(&self, size: Size) -> Result<()> {
        self.agent.resize(size).await
    }
}

/// The task that owns a process of the guest.
struct Task {
    container: Container,
    agent: Agent,
    detached: bool,
    ended: watch::Sender<Option<Exit>>,
    interrupt: Arc<Notify>,
    /// True once a client has sent SIGKILL.
    killed: Arc<AtomicBool>,
    _busy: Busy,
}

impl Task {
    async fn run(
        self,
        spec: ExecSpec,
        io: Io,
        started: oneshot::Sender<Result<()>>,
        exit: oneshot::Sender<Result<Exit>>,
        mut given_up: oneshot::Receiver<()>,
    ) {
        let mut relay = match self.start(spec, io, &mut given_up).await {
            Ok(Some(relay)) => relay,
            Ok(None) => return,
            Err(error) => {
                // The guest may have started it all the same.
                self.delete().await;
                let error = match error.kind {
                    ErrorKind::VmLost if self.container.microvm.is_ending() => {
                        log::debug!("{error}");
                        self.container.has_ended()
                    }
                    _ => error,
                };
                // Fails if nobody waits.
                let _ = started.send(Err(error));
                return;
            }
        };
        if started.send(Ok(())).is_err() {
            relay.cut_off();
            self.delete().await;
            return;
        }
        tokio::select! {
            result = self.attend(&mut relay) => {
                // Fails if nobody waits.
                let _ = exit.send(result);
            }
            // Nobody reads the output any more, and nobody may read the input.
            _ = given_up => relay.cut_off(),
        }
        self.delete().await;
        relay.outputs_ended().await;
    }

    /// Has the agent start the process, with its streams connected. `None` if nobody wants it any
    /// more.
    async fn start(
        &self,
        spec: ExecSpec,
        io: Io,
        given_up: &mut oneshot::Receiver<()>,
    ) -> Result<Option<Relay>> {
        let connected = tokio::select! {
            connected = io.connect(&self.container.microvm.dir) => connected?,
            _ = &mut *given_up => return Ok(None),
        };
        let (tokens, screen, streams) = connected;
        let call = async move {
            self.agent.exec_process(&spec.process, spec.cgroup.as_deref(), tokens, screen).await
        };
        let mut call = pin!(call);
        tokio::select! {
            started = &mut call => started?,
            _ = given_up => {
                // The ends of the streams are others' too, whatever the guest does.
                drop(streams);
                // A process that is not ready yet never runs then. The call goes on meanwhile: what
                // a guest sends for it would pile up otherwise.
                let (called, ()) = tokio::join!(call, self.delete());
                if called.is_ok() {
                    self.delete().await;
                }
                return Ok(None);
            }
        }
        streams.relay().map(Some)
    }

    /// Waits for the end of the process, and passes on its output.
    async fn attend(&self, relay: &mut Relay) -> Result<Exit> {
        let waited = self.agent.wait().await;
        relay.end_inputs();
        let (exit, written) = match waited {
            Ok((exit, written)) => (exit, Some(written)),
            Err(error) => (exit_with_container(&self.container, Some(error)).await?, None),
        };
        self.ended.send_replace(Some(exit));
        let mut readers = relay.readers();
        let passed_on = async {
            match written {
                Some(written) if self.detached => {
                    relay.written(&written, self.container.memory).await;
                }
                Some(_) => tokio::select! {
                    () = relay.outputs_ended() => {}
                    () = self.interrupt.notified() => {}
                },
                None => relay.finished(self.container.memory).await,
            }
        };
        tokio::select! {
            () = passed_on => {}
            () = readers.stopped_reading(), if self.killed.load(Ordering::Relaxed) => {
                relay.cut_off();
            }
        }
        Ok(exit)
    }

    /// Has the guest kill the process, if it has not ended, and forget it.
    async fn delete(&self) {
        match timeout(DELETE_TIMEOUT, self.agent.delete_process()).await {
            Ok(Ok(())) => {}
            // The process has ended with its microVM.
            Ok(Err(error)) => log::debug!("{error}"),
            Err(_) => log::warn!("the guest does not answer, so a process may be left in it"),
        }
    }
}

/// The exit of a process when the connection to the agent broke, by `error`. If the container ended
/// in order, all of its processes were killed with it. Otherwise the exit status is unknown.
async fn exit_with_container(container: &Container, error: Option<Error>) -> Result<Exit> {
    let ended = timeout(END_TIMEOUT, container.ended()).await.ok();
    if ended.as_ref().is_some_and(|ended| ended.exit.is_some()) {
        return Ok(Exit::KILLED);
    }
    let cause = ended.and_then(|ended| ended.error).or(error);
    let cause = cause.map_or_else(|| "its sandbox process is ending".to_owned(), |e| e.message);
    Err(Error::with_kind(
        ErrorKind::VmLost,
        format!(
            "the microVM of container {} is lost, and the exit status of the process is unknown: \
             {cause}",
            container.id
        ),
    ))
}

/// A process whose output may still be on its way, until this is dropped.
struct Busy(Arc<Microvm>);

impl Busy {
    fn of(microvm: &Arc<Microvm>) -> Self {
        microvm.busy.send_modify(|busy| *busy += 1);
        Self(Arc::clone(microvm))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.send_modify(|busy| *busy -= 1);
    }
}

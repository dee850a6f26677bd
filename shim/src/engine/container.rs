//! A container, as its front end holds it.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use isopod_protocol::agent::ContainerStats;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{sleep, timeout},
};

use crate::{
    bundle::GuestContainer,
    container_id::ContainerId,
    engine::{
        microvm::Microvm,
        process_info::ProcessInfo,
        record::Record,
        request::{Command, Ended, Request},
        runtime_namespace::RuntimeNamespace,
        stdio::Io,
    },
    error::{Error, ErrorKind, Result},
    logger,
    microvm::{agent::Agent, disks::OpenDisk, port_forward},
    state::{Exit, StateDir},
    text::seconds,
    timeline::Timeline,
};

/// Longest time for an answer of the agent that changes nothing.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Pause between two questions for kills at a memory limit.
const KILLS_PAUSE: Duration = Duration::from_millis(200);

/// A container to make.
pub(crate) struct NewContainer {
    /// The record, which the engine keeps up to date from then on.
    pub record: Record,
    /// State directory of the container.
    pub dir: Arc<StateDir>,
    /// The container as the agent makes it.
    pub guest: GuestContainer,
    /// The block devices of the container, open.
    pub disks: Vec<OpenDisk>,
    /// Streams of the first process.
    pub io: Io,
    /// True if the output is to end with the reason for a loss of the microVM.
    pub loss_notice: bool,
    /// Namespaces and cgroup that the hooks run in, if there are hooks.
    pub origin: Option<RuntimeNamespace>,
    /// Times of the steps so far.
    pub timeline: Timeline,
}

/// A container of a sandbox. Clones are about the same container, and may be used on any thread.
#[derive(Clone)]
pub(crate) struct Container {
    pub(super) id: ContainerId,
    pub(super) agent: Agent,
    pub(super) microvm: Arc<Microvm>,
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) end: watch::Receiver<Option<Ended>>,
    /// The exit of the first process, once it is known.
    pub(super) exit: watch::Receiver<Option<Exit>>,
    /// Kills at the memory limit, once somebody has asked. One call to the agent serves all who ask.
    pub(super) kills: Arc<OnceLock<Kills>>,
    /// Size of the microVM's memory in bytes.
    pub(super) memory: u64,
}

impl Container {
    /// Has a request carried out. A dropped future does not take the request back.
    ///
    /// # Errors
    ///
    /// If the request is refused or fails. Of the kind [`ErrorKind::Ended`] if the container has
    /// ended.
    pub(crate) async fn ask(&self, request: Request) -> Result<()> {
        let (answer, answered) = oneshot::channel();
        match self.commands.send(Command { request, answer }).await {
            Ok(()) => answered.await.unwrap_or_else(|_| Err(self.has_ended())),
            Err(_) => Err(self.has_ended()),
        }
    }

    /// Passes a request on. A task of its own waits for the answer.
    pub(crate) fn pass_on(&self, request: Request) {
        let container = self.clone();
        let id = self.id.clone();
        let asking = async move {
            if let Err(error) = container.ask(request).await {
                log::debug!("{error}");
            }
        };
        self.microvm.event_loop.spawn(async move { logger::about(id.as_str(), asking).await });
    }

    /// Waits for the end of the container.
    pub(crate) async fn ended(&self) -> Ended {
        let mut end = self.end.clone();
        match end.wait_for(Option::is_some).await.map(|end| end.clone()) {
            Ok(Some(ended)) => ended,
            // Unreachable: the task that owns the container cannot end before it has said how.
            _ => Ended {
                exit: None,
                error: Some(Error::new("the sandbox process has lost the container")),
                timeline: Timeline::default(),
            },
        }
    }

    /// Waits for the exit of the container's first process, whose output may still be on its way.
    /// `None` if the container ends without an exit.
    pub(crate) async fn exit(&self) -> Option<Exit> {
        let mut exit = self.exit.clone();
        tokio::select! {
            biased;
            // The sender may be dropped first.
            Ok(exit) = exit.wait_for(Option::is_some) => *exit,
            ended = self.ended() => ended.exit,
        }
    }

    /// Passes connections to loopback in the sandbox's network namespace on to the container's
    /// loopback, until the container has ended. If that is not possible, the log says so.
    pub(crate) fn forward_ports(&self) {
        let (container, id) = (self.clone(), self.id.clone());
        let forwarding = async move {
            let (agent, dir) = (container.agent.clone(), Arc::clone(&container.microvm.dir));
            tokio::select! {
                result = port_forward::serve(agent, dir) => if let Err(error) = result {
                    log::warn!("ports of container {} are not forwarded: {error}", container.id);
                },
                _ = container.ended() => {}
            }
        };
        self.microvm.event_loop.spawn(async move { logger::about(id.as_str(), forwarding).await });
    }

    /// Lists the container's processes, as its guest reports them.
    pub(crate) async fn processes(&self) -> Result<Vec<ProcessInfo>> {
        let processes = self.answer(self.agent.processes()).await?;
        Ok(processes.into_iter().map(ProcessInfo::from).collect())
    }

    /// Reads the resource use of the container, as its guest reports it.
    pub(crate) async fn stats(&self) -> Result<ContainerStats> {
        self.answer(self.agent.stats()).await
    }

    /// Waits until the container has ended, or the count of its processes that the kernel has
    /// killed for its memory limit is not `seen`. Returns the count, and true if the container has
    /// ended.
    pub(crate) async fn wait_oom(&self, seen: u64) -> Result<(u64, bool)> {
        let mut kills = self.kills.get_or_init(|| watch_kills(self)).clone();
        loop {
            if let Some((count, ended)) = *kills.borrow_and_update()
                && (count != seen || ended)
            {
                return Ok((count, ended));
            }
            if kills.changed().await.is_err() {
                break;
            }
        }
        // The guest is being shut down, or is lost.
        match self.ended().await {
            Ended { exit: None, error: Some(error), .. } => Err(error),
            _ => Ok((seen, true)),
        }
    }

    async fn answer<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        let answered = timeout(ANSWER_TIMEOUT, call).await.unwrap_or_else(|_| {
            Err(Error::new(format!(
                "the guest of container {} does not answer within {}",
                self.id,
                seconds(ANSWER_TIMEOUT)
            )))
        });
        match answered {
            Err(error) if error.kind == ErrorKind::VmLost && self.microvm.is_ending() => {
                log::debug!("{error}");
                Err(self.has_ended())
            }
            answered => answered,
        }
    }

    pub(super) fn has_ended(&self) -> Error {
        Error::with_kind(
            ErrorKind::Ended,
            format!("container {}: container not running (it is ending or has ended)", self.id),
        )
    }
}

/// The kills at a container's memory limit, and true once the container has ended. `None` until the
/// first answer.
type Kills = watch::Receiver<Option<(u64, bool)>>;

/// Starts to watch the kills at a container's memory limit.
fn watch_kills(container: &Container) -> Kills {
    let (tell, told) = watch::channel(None);
    let (agent, id) = (container.agent.clone(), container.id.clone());
    let watching = async move {
        // No container has so many kills, so the first call returns at once.
        let mut seen = u64::MAX;
        loop {
            match agent.wait_oom(seen).await {
                Ok((count, ended)) => {
                    tell.send_replace(Some((count, ended)));
                    if ended {
                        return;
                    }
                    seen = count;
                    // A guest may answer as often as it is asked.
                    sleep(KILLS_PAUSE).await;
                }
                Err(error) => return log::debug!("{error}"),
            }
        }
    };
    container.microvm.event_loop.spawn(async move { logger::about(id.as_str(), watching).await });
    told
}

//! The microVM that a container lives in: its own, or that of its pod.

use std::time::Duration;

use tokio::time::timeout;

use crate::{
    engine::pod::PodVm,
    error::{Error, ErrorKind, Result},
    microvm::{
        agent::Agent,
        vmm::{Vmm, VmmEnd},
    },
    state::Exit,
    timeline::Timeline,
};

/// Longest time for the guest to flush its file systems and to shut down.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest time for the sandbox process of a pod's first container to report that container's end.
const END_TIMEOUT: Duration = Duration::from_secs(20);

/// Longest time for the VMM to give the reason for a broken connection to the guest.
const REASON_TIMEOUT: Duration = Duration::from_secs(2);

/// The microVM of a container.
#[derive(Debug)]
pub(crate) enum Microvm {
    /// Made for the container, and ends with it.
    Own(Vmm),
    /// Made for the first container of the pod, and ends with that container.
    Pod(PodVm),
}

impl Microvm {
    /// Waits for the end of the microVM.
    pub(crate) async fn ended(&self) -> VmmEnd {
        match self {
            Self::Own(vmm) => vmm.ended().await,
            Self::Pod(pod) => VmmEnd::of_pod(pod.ended().await.why),
        }
    }

    /// Exit of a container whose agent no longer answers: SIGKILL if its pod ended in order,
    /// otherwise `None`.
    pub(crate) async fn exit(&self) -> Option<Exit> {
        let Self::Pod(pod) = self else { return None };
        let end = timeout(END_TIMEOUT, pod.ended()).await.ok()?;
        end.in_order.then_some(Exit::KILLED)
    }

    /// The fate of a microVM whose container did not end when it was killed: part of an error text.
    pub(crate) fn fate(&self) -> &'static str {
        match self {
            Self::Own(_) => "so its microVM was ended",
            Self::Pod(_) => "and is left to end with the microVM of its pod",
        }
    }

    /// Fills in the times of the microVM's start, if it was made for the container.
    pub(crate) fn fill_timeline(&self, timeline: &mut Timeline) {
        if let Self::Own(vmm) = self {
            vmm.fill_timeline(timeline);
        }
    }

    /// Ends the container in the microVM: in order if possible, otherwise by force.
    pub(crate) async fn leave(&mut self, agent: &Agent, lost: bool) {
        match self {
            Self::Own(vmm) => shut_down(vmm, agent, lost).await,
            Self::Pod(pod) => pod.leave().await,
        }
    }
}

/// Ends a microVM: by the guest if it can, otherwise by the VMM.
async fn shut_down(vmm: &Vmm, agent: &Agent, lost: bool) {
    if lost {
        vmm.stop().await;
        return;
    }
    let shutdown = async {
        tokio::select! {
            end = vmm.ended() => end,
            result = agent.shutdown() => {
                if let Err(error) = result {
                    log::debug!("{error}");
                    return vmm.stop().await;
                }
                vmm.ended().await
            }
        }
    };
    match timeout(SHUTDOWN_TIMEOUT, shutdown).await {
        Ok(end) if end.is_shutdown() => {}
        Ok(end) => log::debug!("the microVM did not shut down in order: {}", end.explain()),
        Err(_) => {
            log::warn!("the guest did not shut down, so its microVM was ended");
            vmm.stop().await;
        }
    }
}

/// Runs an action that needs the guest, within `limit`. If the microVM ends meanwhile, the error
/// has the reason for that.
pub(crate) async fn in_guest<T>(
    microvm: &Microvm,
    what: &str,
    limit: Duration,
    action: impl Future<Output = Result<T>>,
) -> Result<T> {
    tokio::select! {
        biased;
        result = timeout(limit, action) => match result {
            Ok(Err(error)) if error.kind == ErrorKind::VmLost => Err(loss(microvm, error).await),
            Ok(result) => result,
            Err(_) => Err(Error::new(format!(
                "{what} took longer than {} seconds in the guest", limit.as_secs()
            ))),
        },
        end = microvm.ended() => Err(end.explain()),
    }
}

/// The reason why a connection to the guest broke: the VMM's if it ends too, otherwise `error`.
pub(crate) async fn loss(microvm: &Microvm, error: Error) -> Error {
    match timeout(REASON_TIMEOUT, microvm.ended()).await {
        Ok(end) => end.explain(),
        Err(_) => Error { kind: ErrorKind::VmLost, ..error },
    }
}

//! The microVM that a container lives in: its own, or that of its pod.

use std::time::Duration;

use tokio::time::timeout;

use super::{
    agent::Agent,
    pod::PodVm,
    timeline::Timeline,
    vmm::{Vmm, VmmEnd},
};
use crate::state::Exit;

/// How long the guest may take to flush its file systems and to shut down.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the sandbox process of a pod's first container may take to say how that ended.
const END_TIMEOUT: Duration = Duration::from_secs(20);

/// The microVM of a container.
#[derive(Debug)]
pub(super) enum Machine {
    /// Made for it, and ends with it.
    Own(Vmm),
    /// Made for the first container of its pod, and ends with that.
    Pod(PodVm),
}

impl Machine {
    /// Waits for the end of the microVM.
    pub(super) async fn ended(&self) -> VmmEnd {
        match self {
            Self::Own(vmm) => vmm.ended().await,
            Self::Pod(pod) => VmmEnd::of_pod(pod.ended().await.why),
        }
    }

    /// How a container has ended of which nothing more was heard, if that is known: killed with the rest
    /// of its pod, when that ended in order.
    pub(super) async fn exit(&self) -> Option<Exit> {
        let Self::Pod(pod) = self else { return None };
        let end = timeout(END_TIMEOUT, pod.ended()).await.ok()?;
        end.in_order.then_some(Exit { status: 128 + 9, oom_killed: false })
    }

    /// What has become of a microVM that did not do as it was told.
    pub(super) fn fate(&self) -> &'static str {
        match self {
            Self::Own(_) => "so its microVM was ended",
            Self::Pod(_) => "and is left to end with the microVM of its pod",
        }
    }

    /// Fills in what is known of the microVM's start, if that was the container's.
    pub(super) fn fill_timeline(&self, timeline: &mut Timeline) {
        if let Self::Own(vmm) = self {
            vmm.fill_timeline(timeline);
        }
    }

    /// Ends the container's time in it: in order if it can be, and in any case.
    pub(super) async fn leave(&mut self, agent: &Agent, lost: bool) {
        match self {
            Self::Own(vmm) => shut_down(vmm, agent, lost).await,
            Self::Pod(pod) => pod.leave().await,
        }
    }
}

/// Ends a microVM.
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

//! The microVM of a sandbox, as all of its containers share it.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::{
    runtime::Handle,
    sync::{Mutex, watch},
    time::timeout,
};

use isopod_protocol::agent;

use crate::{
    error::{Error, ErrorKind, Result},
    event_loop::blocking,
    microvm::{
        agent::Agent,
        disks::{AttachedDisks, DiskSlots, OpenDisk},
        host_sockets::HostSockets,
        share::Share,
        vmm::{Vmm, VmmEnd},
    },
    network::Network,
    state::{StateDir, VSOCK_SOCKET},
    text::seconds,
    timeline::Timeline,
};

/// Longest time for the guest to flush its file systems and to shut down.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest time for the VMM to give the reason for a broken connection to the guest.
const REASON_TIMEOUT: Duration = Duration::from_secs(2);

/// A running microVM, with all that ends with it.
pub(crate) struct Microvm {
    pub(crate) vmm: Vmm,
    /// Calls about the guest as a whole.
    pub(crate) agent: Agent,
    /// State directory of the sandbox.
    pub(crate) dir: Arc<StateDir>,
    pub(crate) share: Arc<Share>,
    pub(crate) disks: DiskSlots,
    pub(crate) sockets: HostSockets,
    /// Taken by a thread while it is looked at.
    pub(crate) network: Mutex<Option<Network>>,
    /// Set once the microVM is being ended. The first reason counts.
    pub(crate) ending: OnceLock<Ending>,
    /// Number of further processes whose output may still be on its way.
    pub(crate) busy: watch::Sender<usize>,
    /// The event loop of the thread that owns the sandbox.
    pub(crate) event_loop: Handle,
}

/// The reason why a microVM is being ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// Its first container has ended in order.
    InOrder,
    /// It is lost.
    Lost,
    /// Nobody wants the sandbox any more: its end is no loss.
    GivenUp,
}

impl Microvm {
    /// Waits for the end of the microVM.
    pub(crate) async fn ended(&self) -> VmmEnd {
        self.vmm.ended().await
    }

    /// Tells whether the microVM is being ended, or has ended, in order.
    pub(crate) fn ends_in_order(&self) -> bool {
        self.ending.get() == Some(&Ending::InOrder)
    }

    /// Tells whether the microVM is being ended, or has ended.
    pub(crate) fn is_ending(&self) -> bool {
        self.ending.get().is_some() || self.vmm.has_ended()
    }

    /// Runs an action that needs the guest, within `limit`. If the microVM ends meanwhile, the error
    /// has the reason for that.
    pub(crate) async fn within<T>(
        &self,
        what: &str,
        limit: Duration,
        action: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        tokio::select! {
            biased;
            result = timeout(limit, action) => match result {
                Ok(Err(error)) if error.kind == ErrorKind::VmLost => Err(self.loss(error).await),
                Ok(result) => result,
                Err(_) => Err(Error::new(format!(
                    "{what} took longer than {} in the guest", seconds(limit)
                ))),
            },
            end = self.ended() => Err(end.explain()),
        }
    }

    /// The reason why a connection to the guest broke: the VMM's if it ends too, otherwise `error`.
    pub(crate) async fn loss(&self, error: Error) -> Error {
        match timeout(REASON_TIMEOUT, self.ended()).await {
            Ok(end) => end.explain(),
            Err(_) => Error { kind: ErrorKind::VmLost, ..error },
        }
    }

    /// Looks for interfaces that the network namespace has got since the boot. Returns the guest's
    /// part of their setup.
    pub(crate) async fn complete_network(&self) -> Result<Option<agent::Network>> {
        let mut place = self.network.lock().await;
        let network = place.take_if(|network| network.has_namespace());
        let Some(mut network) = network else { return Ok(None) };
        let (network, completed) = blocking(move || {
            let completed = network.complete();
            Ok((network, completed))
        })
        .await?;
        *place = Some(network);
        completed
    }

    /// Gives the guest a container's disks. Not within a time limit of its caller's, since a dropped
    /// future would leave disks behind.
    pub(crate) async fn attach_disks(&self, disks: Vec<OpenDisk>) -> Result<AttachedDisks> {
        match self.disks.attach(&self.vmm, &self.agent, disks).await {
            Err(error) if error.kind == ErrorKind::VmLost => Err(self.loss(error).await),
            attached => attached,
        }
    }

    /// Takes back the disks of a container that has ended.
    pub(crate) async fn detach_disks(&self, disks: AttachedDisks) {
        if !self.is_ending() {
            self.disks.detach(&self.vmm, &self.agent, disks).await;
        }
    }

    /// Tells whether nobody wants the sandbox any more.
    pub(crate) fn is_given_up(&self) -> bool {
        self.ending.get() == Some(&Ending::GivenUp)
    }

    /// Ends the microVM: by the guest if it ends in order, otherwise by the VMM. Then removes
    /// everything that the VMM needed.
    pub(crate) async fn shut_down(&self, ending: Ending) {
        // An earlier reason stays.
        let _ = self.ending.set(ending);
        self.end(ending == Ending::InOrder).await;
        // The drop removes the redirects.
        drop(self.network.lock().await.take());
        self.share.unmount();
        self.dir.remove_file(VSOCK_SOCKET);
    }

    async fn end(&self, in_order: bool) {
        if !in_order {
            self.vmm.stop().await;
            return;
        }
        let shutdown = async {
            tokio::select! {
                end = self.ended() => end,
                result = self.agent.shutdown() => {
                    if let Err(error) = result {
                        log::debug!("{error}");
                        return self.vmm.stop().await;
                    }
                    self.ended().await
                }
            }
        };
        match timeout(SHUTDOWN_TIMEOUT, shutdown).await {
            Ok(end) if end.is_shutdown() => {}
            Ok(end) => log::debug!("the microVM did not shut down in order: {}", end.explain()),
            Err(_) => {
                log::warn!("the guest did not shut down, so its microVM was ended");
                self.vmm.stop().await;
            }
        }
    }

    /// Fills in the times of the microVM's start.
    pub(crate) fn fill_timeline(&self, timeline: &mut Timeline) {
        self.vmm.fill_timeline(timeline);
    }
}

//! The first container of a sandbox: the microVM is made for it, and ends with it.

use std::{os::fd::OwnedFd, sync::Arc};

use tokio::net::UnixListener;

use crate::{
    bundle::GuestContainer,
    control::{
        connection::Connection,
        server::{self, Server},
    },
    engine::{Container, Ended, NewContainer, NewSandbox, Place, Request, Sandbox},
    error::Result,
    microvm::{disks::OpenDisk, placement::Placement, share::Trees},
    network::Network,
    sandbox_process::{holder, launch::Launch, streams},
    signals::{Signals, WINCH},
    state::{CONTROL_SOCKET, StateDir},
    timeline::Timeline,
};

/// The first container of a sandbox.
pub(super) struct First {
    dir: Arc<StateDir>,
    listener: UnixListener,
    sandbox: Sandbox,
    container: Container,
    /// The host's end of a new terminal.
    console: Option<OwnedFd>,
}

/// Boots the microVM and makes the container.
pub(super) async fn create(
    launch: &Launch,
    place: &mut Place,
    network: Network,
    mut timeline: Timeline,
) -> Result<First> {
    let bundle = &launch.bundle;
    let process = bundle.spec.process().as_ref();
    let trees = Trees::open(bundle)?;
    let disks = OpenDisk::open_all(&bundle.disks)?;
    let guest = GuestContainer::new(bundle, &launch.id, trees.inner(), &[]);
    let has_network = network.has_namespace();
    let new = NewSandbox {
        id: &launch.id,
        bundle,
        settings: &launch.boot,
        dir: Arc::clone(&place.dir),
        trees,
        spare_nics: launch.spare_nics,
        spare_disks: launch.spare_disks,
        network,
        place: Placement {
            cgroup: place.record.cgroup.as_ref().map(|cgroup| cgroup.dir().to_owned()),
            oom_score_adj: process.and_then(|process| process.oom_score_adj()),
        },
    };
    let booted = Sandbox::boot(new, &mut timeline, |vmm| {
        place.record.vmm = Some(vmm);
        place.record.write(&place.dir)
    })
    .await?;
    // Connections wait until the container is there.
    let listener = server::listen(&place.dir)?;
    let (io, console) = match launch.holder {
        true => (streams::none()?, None),
        false => streams::open(launch)?,
    };
    let new = NewContainer {
        record: place.record.clone(),
        dir: Arc::clone(&place.dir),
        guest,
        disks,
        io,
        loss_notice: launch.detached,
        origin: place.origin.clone(),
        timeline,
    };
    let (sandbox, container) = booted.create(new).await?;
    if launch.holder && has_network {
        // For `kubectl port-forward`.
        container.forward_ports();
    }
    Ok(First { dir: Arc::clone(&place.dir), listener, sandbox, container, console })
}

impl First {
    /// Serves the control socket, and passes signals on, until all containers have ended. A holder
    /// has the connection to its launching process, and ends when it is not used any more.
    pub(super) async fn attend(
        self,
        signals: &mut Signals,
        launcher: Option<&mut Connection>,
    ) -> Ended {
        let Self { dir, listener, sandbox, container, console } = self;
        let server = Server::start(listener, sandbox.clone());
        // The terminal's size may have changed while the container was created.
        pass_on(&container, WINCH, console.as_ref());
        let unused = async {
            match launcher {
                Some(launcher) => holder::unused(sandbox.clone(), launcher).await,
                None => std::future::pending().await,
            }
            container.pass_on(Request::Destroy);
            std::future::pending::<()>().await;
        };
        tokio::pin!(unused);
        let ended = loop {
            tokio::select! {
                biased;
                ended = container.ended() => break ended,
                () = &mut unused => {}
                number = signals.next() => pass_on(&container, number, console.as_ref()),
            }
        };
        sandbox.ended().await;
        dir.remove_file(CONTROL_SOCKET);
        server.close().await;
        ended
    }

    /// Ends the microVM, and waits until nobody writes the record any more.
    pub(super) async fn give_up(self) {
        self.sandbox.stop().await;
        self.sandbox.ended().await;
    }
}

/// Passes a signal of this process on.
fn pass_on(container: &Container, number: u32, console: Option<&OwnedFd>) {
    if let Some(request) = Request::of_signal(number, console) {
        container.pass_on(request);
    }
}

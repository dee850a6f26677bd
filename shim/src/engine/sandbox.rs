//! A sandbox: a booted microVM and the containers in it.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use isopod_protocol::agent;
use tokio::{
    runtime::Handle,
    sync::{Notify, mpsc, watch},
    time::timeout,
};

use crate::{
    bundle::{Bundle, place_disks},
    call_times::call_times,
    clock,
    container_id::ContainerId,
    engine::{
        container::{Container, NewContainer},
        hooks,
        lifecycle::{DELETE_TIMEOUT, Lifecycle, START_TIMEOUT, lost_with},
        microvm::{Ending, Microvm},
        stdio::Relay,
    },
    error::{Error, ErrorKind, Result},
    event_loop::{AbortOnDrop, blocking},
    figures::Figures,
    logger,
    microvm::{
        agent::Agent,
        boot::{self, BootSettings, Devices},
        disks::{self, AttachedDisks, DiskSlots},
        dns_proxy::DnsProxy,
        drop_caches::DropCaches,
        guest_clock,
        host_sockets::HostSockets,
        placement::Placement,
        share::{Attached, Share, Trees},
        volumes,
    },
    network::{self, Network},
    process_id::ProcessId,
    state::{StateDir, Status},
    timeline::{GuestBoot, Timeline},
};

/// Longest time for a reader to take output of further processes that is left when the microVM has
/// ended. After that it is cut off: a reader that has stopped reading must not keep the container
/// from ending.
const LINGER: Duration = Duration::from_secs(5);

/// Most requests to a container that wait for its task.
const MAX_COMMANDS: usize = 16;

/// A sandbox. Clones are the same sandbox, and may be used on any thread. The work is done in the
/// event loop of the thread that has booted the sandbox: only this thread needs to be in the
/// sandbox's namespaces, and the VMM ends with it.
#[derive(Clone)]
pub(crate) struct Sandbox {
    microvm: Arc<Microvm>,
    drop_caches: DropCaches,
    /// Longest time for the guest to build a container without hooks.
    create_timeout: Duration,
    containers: Arc<Mutex<Containers>>,
    /// Notified when a creation or a container has come to its end, or is not waited for any more.
    changed: Arc<Notify>,
}

#[derive(Default)]
struct Containers {
    /// The container that the microVM was made for, and ends with.
    first: Option<ContainerId>,
    /// All containers that have not ended, and the first.
    all: HashMap<ContainerId, Container>,
    /// Further containers that are being made.
    creating: HashSet<ContainerId>,
    /// Number of those who are about to make a further container.
    holds: usize,
    /// True once no further container can be made.
    left_alone: bool,
}

/// All that a microVM is made of.
pub(crate) struct NewSandbox<'a> {
    /// Id of the first container, which names the microVM.
    pub id: &'a ContainerId,
    /// Bundle of the first container.
    pub bundle: &'a Bundle,
    /// Further settings.
    pub settings: &'a BootSettings,
    /// State directory of the sandbox.
    pub dir: Arc<StateDir>,
    /// Trees of the first container. They are in the share before the VMM sees it.
    pub trees: Trees,
    /// Number of spare devices for a network namespace without interfaces.
    pub spare_nics: u8,
    /// Number of places for disks of containers that come later.
    pub spare_disks: u8,
    /// The network of the namespace that this thread is in.
    pub network: Network,
    /// Place of the VMM on the host.
    pub place: Placement,
}

/// A sandbox whose first container is to be made.
pub(crate) struct Booted {
    /// The sandbox.
    pub sandbox: Sandbox,
    /// Trees of the first container in the share.
    first: Attached,
    /// The guest's part of the network's setup, for the first container.
    guest_network: Option<agent::Network>,
}

impl Sandbox {
    /// Boots a microVM, in the event loop that owns the sandbox from then on. `made` is told of the
    /// VMM once it runs. Dropping the future takes everything down again.
    ///
    /// # Errors
    ///
    /// If something that the microVM needs is missing, or the guest does not become ready.
    pub(crate) async fn boot(
        new: NewSandbox<'_>,
        timeline: &mut Timeline,
        made: impl FnOnce(ProcessId) -> Result<()>,
    ) -> Result<Booted> {
        let NewSandbox { spare_nics, spare_disks, .. } = new;
        let NewSandbox { id, bundle, settings, dir, trees, mut network, place, .. } = new;
        let disk_slots = disks::slots(bundle.disks.len(), spare_disks)?;
        let guest_network = network.connect(bundle.vm.vcpus, spare_nics)?;
        let share = Arc::new(Share::build(&dir)?);
        let first = share.attach(id, &trees)?;
        drop(trees);
        timeline.shared = Some(clock::monotonic_us());
        let devices = Devices { share: &share, network: &mut network, disk_slots };
        let (vmm, connections) = boot::start(id, bundle, settings, &dir, devices, &place)?;
        made(vmm.id())?;
        let sockets = HostSockets::default();
        let resolver = network.has_namespace().then(|| DnsProxy::new(network::RESOLVER));
        let hello =
            boot::wait_for_agent(&vmm, connections, resolver, sockets.clone(), settings.timeout);
        let hello = hello.await?;
        timeline.ready = Some(clock::monotonic_us());
        timeline.guest = Some(GuestBoot {
            kernel: hello.kernel,
            init_us: hello.init_us,
            ready_us: hello.ready_us,
            memory_used_kib: hello.memory_used_kib,
        });
        let create_timeout = START_TIMEOUT.max(settings.timeout);
        let agent = tokio::select! {
            agent = timeout(create_timeout, Agent::connect(&dir)) => agent.unwrap_or_else(|_| {
                Err(Error::new("the guest became ready, and then took no connection to its agent"))
            })?,
            end = vmm.ended() => return Err(end.explain()),
        };
        let drop_caches = vmm.drop_caches();
        let microvm = Microvm {
            vmm,
            agent,
            dir,
            share,
            disks: DiskSlots::new(disk_slots),
            sockets,
            network: tokio::sync::Mutex::new(Some(network)),
            ending: OnceLock::new(),
            busy: watch::Sender::new(0),
            event_loop: Handle::current(),
        };
        microvm.within("setting up the guest", create_timeout, set_up(&microvm.agent)).await?;
        tokio::spawn(drop_caches.clone().serve(microvm.agent.clone()));
        let sandbox = Self {
            microvm: Arc::new(microvm),
            drop_caches,
            create_timeout,
            containers: Arc::default(),
            changed: Arc::default(),
        };
        Ok(Booted { sandbox, first, guest_network })
    }

    /// Notes that a further container is about to be made.
    ///
    /// # Errors
    ///
    /// If there is a container of this id.
    pub(crate) fn reserve(&self, id: &ContainerId) -> Result<Creating> {
        let mut containers = self.containers();
        if containers.left_alone {
            return Err(Error::new("the microVM of the pod is ending"));
        }
        if containers.all.contains_key(id) || !containers.creating.insert(id.clone()) {
            return Err(Error::new(format!("there is a container {id} in the microVM already")));
        }
        Ok(Creating { sandbox: self.clone(), id: id.clone() })
    }

    /// Waits until a container is made, if it is being made.
    pub(crate) async fn settled(&self, id: &ContainerId) {
        loop {
            let changed = self.changed.notified();
            if !self.containers().creating.contains(id) {
                return;
            }
            changed.await;
        }
    }

    /// Keeps the sandbox from being left alone. `None` if it has been already.
    pub(crate) fn hold(&self) -> Option<Held> {
        let mut containers = self.containers();
        if containers.left_alone {
            return None;
        }
        containers.holds += 1;
        Some(Held(self.clone()))
    }

    /// Waits until the first container is the only one, and nobody holds the sandbox. No other
    /// container can be made from then on.
    pub(crate) async fn left_alone(&self) {
        loop {
            // Made before the look, so that no notification is lost between the two.
            let changed = self.changed.notified();
            {
                let mut containers = self.containers();
                let Containers { first, all, creating, holds, left_alone } = &mut *containers;
                let others = all.keys().any(|id| Some(id) != first.as_ref());
                if !others && creating.is_empty() && *holds == 0 {
                    *left_alone = true;
                    return;
                }
            }
            changed.await;
        }
    }

    /// Has a creation that is under way fail.
    pub(crate) async fn abandon(&self, id: &ContainerId) {
        let agent = self.microvm.agent.of_container(id);
        let _ = timeout(DELETE_TIMEOUT, agent.delete_container()).await;
    }

    /// The container of this id, unless it has ended.
    pub(crate) fn container(&self, id: &ContainerId) -> Option<Container> {
        self.containers().all.get(id).cloned()
    }

    /// Waits until all containers have ended, and their output has been passed on. The first
    /// container takes the others along.
    pub(crate) async fn ended(&self) {
        let all: Vec<Container> = self.containers().all.values().cloned().collect();
        for container in all {
            container.ended().await;
        }
        let mut busy = self.microvm.busy.subscribe();
        if timeout(LINGER, busy.wait_for(|busy| *busy == 0)).await.is_err() {
            log::warn!("output of a process that nobody reads is cut off");
        }
    }

    /// Figures for the sandbox's operator. They need no guest.
    pub(crate) async fn figures(&self) -> Figures {
        let vmm = self.microvm.vmm.figures().await;
        let vmm = vmm.inspect_err(|error| log::warn!("{error}")).ok();
        Figures { calls: call_times(), vmm }
    }

    /// Gives the sandbox up: ends the microVM without telling the guest.
    pub(crate) async fn stop(&self) {
        self.microvm.shut_down(Ending::GivenUp).await;
    }

    async fn build(
        &self,
        new: NewContainer,
        mut attached: Attached,
        network: Option<agent::Network>,
    ) -> Result<Container> {
        let NewContainer { mut record, dir, mut guest, disks, io, loss_notice, origin, timeline } =
            new;
        record.timeline = timeline;
        let id = record.id.clone();
        let agent = self.microvm.agent.of_container(&id);
        let covers =
            tokio::spawn(logger::inherit(attached.take_covers().keep(self.drop_caches.clone())));
        let covers = AbortOnDrop(covers);
        let hooks = hooks::creation_limit(record.hooks.as_ref());
        let limit = self.create_timeout.saturating_add(hooks);
        let state = record.hooks.as_ref().map(|_| record.state_at(Status::Creating));
        let disks = match self.microvm.attach_disks(disks).await {
            Ok(disks) => disks,
            Err(error) => {
                return Err(self.failed(&id, attached, AttachedDisks::default(), error).await);
            }
        };
        place_disks(&mut guest.spec, &guest.disks, &disks.guest);
        let opened = attached.take_volumes();
        // Let go when the container has ended.
        let sockets = self.microvm.sockets.share(&guest.host_sockets);
        let building = async {
            let (tokens, screen, mut streams) = io.connect(&self.microvm.dir).await?;
            if loss_notice {
                streams = streams.with_loss_notice();
            }
            let contents = volumes::read_all(&opened).await?;
            let state = state.as_ref();
            agent.create_container(&guest, state, tokens, screen, network, contents).await?;
            let followed: Vec<_> =
                opened.into_iter().map(|open| volumes::follow(open, agent.clone())).collect();
            record.timeline.created = Some(clock::monotonic_us());
            if self.containers().first.is_none() {
                self.microvm.fill_timeline(&mut record.timeline);
            }
            record.status = Status::Created;
            record.write(&dir)?;
            Ok((streams.relay()?, followed))
        };
        let built = self.microvm.within("creating the container", limit, building).await;
        let (relay, volumes): (Relay, _) = match built {
            Ok(built) => built,
            Err(error) => return Err(self.failed(&id, attached, disks, error).await),
        };
        let (commands, receiver) = mpsc::channel(MAX_COMMANDS);
        let (tell, end) = watch::channel(None);
        let (tell_exit, exit) = watch::channel(None);
        let memory = record.vm.memory_mib << 20;
        let container = Container {
            id: id.clone(),
            agent: agent.clone(),
            microvm: Arc::clone(&self.microvm),
            commands,
            end,
            exit,
            kills: Arc::default(),
            memory,
        };
        let first = {
            let mut containers = self.containers();
            containers.all.insert(id.clone(), container.clone());
            let first = containers.first.get_or_insert_with(|| id.clone()).clone();
            Some(first).filter(|first| *first != id)
        };
        let lifecycle = Lifecycle {
            dir,
            record,
            origin,
            microvm: Arc::clone(&self.microvm),
            first,
            attached,
            disks,
            _sockets: sockets,
            _volumes: volumes,
            covers,
            agent,
            relay,
            tell_exit,
        };
        let sandbox = self.clone();
        tokio::spawn(async move {
            let ended = logger::about(id.as_str(), lifecycle.run(receiver)).await;
            tell.send_replace(Some(ended));
            let mut containers = sandbox.containers();
            if containers.first.as_ref() != Some(&id) {
                containers.all.remove(&id);
            }
            sandbox.changed.notify_waiters();
        });
        Ok(container)
    }

    /// Takes down a container that could not be made. Returns the error for its caller.
    async fn failed(
        &self,
        id: &ContainerId,
        attached: Attached,
        disks: AttachedDisks,
        error: Error,
    ) -> Error {
        // Without a first container the microVM is not needed any more either.
        let first = self.containers().first.clone();
        let Some(first) = first else { return error };
        // After that the guest uses no tree and no disk any more.
        self.abandon(id).await;
        self.microvm.detach_disks(disks).await;
        attached.detach().await;
        match error.kind {
            ErrorKind::VmLost => lost_with(&first, error),
            _ => error,
        }
    }

    fn containers(&self) -> MutexGuard<'_, Containers> {
        // Whoever panicked has left the table whole: each change is one call.
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A further container that is being made, until this is dropped.
pub(crate) struct Creating {
    sandbox: Sandbox,
    id: ContainerId,
}

impl Creating {
    /// Makes the container, up to a process that waits to be started.
    ///
    /// # Errors
    ///
    /// If a tree cannot be shared, or the guest cannot build the container. Nothing of the container
    /// is left then.
    pub(crate) async fn create(self, new: NewContainer, trees: Trees) -> Result<Container> {
        let event_loop = self.sandbox.microvm.event_loop.clone();
        let created = event_loop.spawn(async move {
            let (share, id) = (Arc::clone(&self.sandbox.microvm.share), self.id.clone());
            let about = id.clone();
            let made = async {
                let attached = blocking(move || share.attach(&id, &trees)).await?;
                self.sandbox.build(new, attached, None).await
            };
            logger::about(about.as_str(), made).await
        });
        created.await.unwrap_or_else(|_| Err(Error::new("the sandbox process is ending")))
    }
}

impl Drop for Creating {
    fn drop(&mut self) {
        self.sandbox.containers().creating.remove(&self.id);
        self.sandbox.changed.notify_waiters();
    }
}

/// Keeps a sandbox from being left alone, until this is dropped.
pub(crate) struct Held(Sandbox);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.containers().holds -= 1;
        self.0.changed.notify_waiters();
    }
}

impl Booted {
    /// Makes the first container, up to a process that waits to be started.
    ///
    /// # Errors
    ///
    /// If the guest cannot build the container.
    pub(crate) async fn create(self, new: NewContainer) -> Result<(Sandbox, Container)> {
        let Self { sandbox, first, guest_network } = self;
        let container = sandbox.build(new, first, guest_network).await?;
        Ok((sandbox, container))
    }
}

/// Sets up the guest as a whole, and keeps its clock right from then on.
async fn set_up(agent: &Agent) -> Result<()> {
    let steps = guest_clock::Steps::watch()?;
    let began = Instant::now();
    agent.setup_guest().await?;
    // The guest's clock was set at some moment of this call.
    let ask = began.elapsed() > guest_clock::WELL_SET;
    tokio::spawn(guest_clock::keep(agent.clone(), steps, ask));
    Ok(())
}

//! `main` of the sandbox process.

use std::{
    iter,
    os::fd::AsFd,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use isopod_protocol::agent;
use oci_spec::runtime::LinuxResources;
use serde_json::Value;
use tokio::net::UnixListener;

use crate::{
    bundle::{Bind, Inner, RESOLV_CONF, guest_spec},
    cgroup::{CgroupPlan, CpuLimits},
    clock,
    control::{
        Message,
        server::{self, Launcher, Server},
        spawn::{Descriptors, Given, read_document},
        versions::{Protocols, STATE_VERSION},
    },
    engine::{
        guest_process::GuestProcess,
        hooks::{self, Point, RuntimeNamespace},
        launch::Launch,
        lifecycle::{Lifecycle, START_TIMEOUT},
        microvm::{Microvm, in_guest},
        pod::{PodShare, PodVm},
        record::Record,
        stdio::{self, Ends, Relay, Release},
    },
    error::{Error, Explain, Result},
    event_loop::event_loop,
    limits,
    microvm::{
        agent::Agent,
        boot,
        dns_proxy::DnsProxy,
        drop_caches::DropCaches,
        guest_clock,
        mount_view::{self, Cover},
        share::{self, Share},
    },
    network::{self, Network},
    oom_score,
    process_id::ProcessId,
    signals::Signals,
    state::{PROCESS_FILE, StateDir, Status},
    terminal::Size,
    timeline::{GuestBoot, Timeline},
};

/// Stack of the worker thread in bytes: as large as that of a first thread.
const STACK: usize = 8 << 20;

/// Runs the sandbox process to its end. Returns its exit status: the container's, if there is one.
///
/// # Errors
///
/// If the sandbox process cannot even begin. Nothing has been made then, and the end of the
/// connection tells the launching process.
pub fn main(descriptors: Descriptors) -> Result<u8> {
    let began_us = clock::monotonic_us();
    // The kernel names a process after the link that was executed: `exe`.
    rustix::thread::set_name(c"isopod").explain(|| "cannot set this process's name".into())?;
    let Given { socket, state } = descriptors.take()?;
    limits::raise()?;
    let launch: Launch = read_document(&socket)?;
    launch.preserved.iter().try_for_each(|one| one.guard())?;
    let path = StateDir::path_of(state.as_fd())?;
    // Hooks run in the namespaces and the cgroup that this process comes from.
    let cgroup = launch.cgroup.as_ref().map(CgroupPlan::caller);
    let origin =
        launch.bundle.spec.hooks().as_ref().map(|_| RuntimeNamespace::open(cgroup)).transpose();
    // Before any thread starts: setns(2) and unshare(2) move one thread only.
    let (namespace, origin) = match origin {
        Ok(origin) => {
            (share::enter_namespace().and_then(|()| network::enter(&launch.bundle.network)), origin)
        }
        Err(error) => (Err(error), None),
    };
    let (cover, covered) = mount_view::main_thread();
    let work = move || {
        event_loop()?.block_on(async {
            let launcher = Launcher::new(socket)?;
            // Opened again, because the inherited descriptor is of the old mount namespace. The
            // inherited descriptor stays open for its lock.
            let dir = StateDir::adopt(&path, launch.made.clone())?;
            let timeline = Timeline {
                command: Some(launch.command_us),
                sandbox: Some(began_us),
                ..Timeline::default()
            };
            let sandbox = Sandbox {
                launch,
                dir,
                timeline,
                origin,
                cover,
                record: None,
                network: None,
                share: None,
                inner: Vec::new(),
                drop_caches: DropCaches::default(),
                microvm: None,
            };
            Ok(sandbox.run(namespace, launcher).await)
        })
    };
    let worker =
        thread::Builder::new().name(share::WORKER.to_owned()).stack_size(STACK).spawn(work);
    let worker = worker.explain(|| "cannot start a thread".into())?;
    covered.serve();
    let status = worker.join().unwrap_or_else(|_| Err(Error::new("the sandbox process panicked")));
    drop(state);
    status
}

/// Everything that has been made so far, so that all of it can be taken down from any point.
struct Sandbox {
    launch: Launch,
    dir: StateDir,
    timeline: Timeline,
    /// Namespaces and cgroup that this process comes from, if there are hooks.
    origin: Option<RuntimeNamespace>,
    /// The handle by which others get to see the mount view as the root of this process.
    cover: Cover,
    /// The record as first written. From then on the container exists.
    record: Option<Record>,
    network: Option<Network>,
    share: Option<Share>,
    /// Mounts of the host below the container's root file system and bind mounts.
    inner: Vec<Inner>,
    drop_caches: DropCaches,
    microvm: Option<Microvm>,
}

/// Result of creating a container.
struct Created {
    process: GuestProcess,
    relay: Relay,
    record: Record,
}

impl Sandbox {
    async fn run(mut self, namespace: Result<()>, mut launcher: Launcher) -> u8 {
        let prepared = namespace.and_then(|()| Signals::new());
        let created = match prepared {
            Ok(mut signals) => {
                let created = tokio::select! {
                    created = self.create() => created,
                    () = launcher.gone() => Err(Error::new("the command that created it is gone")),
                    number = signals.next_ending() => {
                        Err(Error::new(format!("interrupted by signal {number}")))
                    }
                };
                created.map(|created| (created, signals))
            }
            Err(error) => Err(error),
        };
        let (created, signals) = match created {
            Ok(created) => created,
            Err(error) => return self.give_up(error, &launcher).await,
        };
        match self.announce(&created, &launcher).await {
            Ok(listener) => {
                let server = Server::start(listener, launcher);
                match self.hand_over(created) {
                    Some(lifecycle) => lifecycle.run(server, signals).await,
                    // Unreachable: a created container has a microVM and a network.
                    None => 1,
                }
            }
            Err(error) => self.give_up(error, &launcher).await,
        }
    }

    /// Builds everything, up to a container whose process waits to be started.
    async fn create(&mut self) -> Result<Created> {
        let mut record = self.first_record()?;
        let network = Network::new(self.launch.bundle.network.clone(), self.resolv_conf())?;
        record.network = network.taken();
        record.write(&self.dir)?;
        self.record = Some(record.clone());
        if let Err(error) = self.enter_cgroup() {
            record.cgroup = None;
            self.record = Some(record.clone());
            if self.launch.cgroup.as_ref().is_some_and(CgroupPlan::is_asked_for) {
                return Err(error);
            }
            log::debug!("no cgroup of its own: {error}");
            record.write(&self.dir)?;
        }
        for point in [Point::Prestart, Point::CreateRuntime] {
            hooks::run(point, &record, self.origin.as_ref()).await?;
        }
        let process = self.launch.bundle.spec.process().as_ref();
        oom_score::adjust(process.and_then(|process| process.oom_score_adj()))?;
        let guest_network = match &self.launch.pod {
            None => self.boot(&mut record, network).await?,
            Some(member) => {
                self.network = Some(network);
                let pod = &member.pod;
                let mut share =
                    PodShare::attach(pod.process, &pod.dir, &self.launch.id, &self.launch.bundle)?;
                share.keep_covers(self.drop_caches.clone());
                self.inner = share.inner().to_vec();
                self.timeline.shared = Some(clock::monotonic_us());
                let vm = PodVm::enter(&self.dir, &self.launch.id, pod, share).await?;
                self.microvm = Some(Microvm::Pod(vm));
                None
            }
        };
        let Some(microvm) = &self.microvm else { return Err(Error::new("there is no microVM")) };
        let (launch, dir) = (&self.launch, &self.dir);
        let create_hooks =
            launch.bundle.spec.hooks().as_ref().and_then(|h| h.create_container().as_deref());
        // If one of the hooks may take for ever, so may the creation.
        let hooks = hooks::time_limit(create_hooks.unwrap_or_default()).unwrap_or(Duration::MAX);
        let limit = START_TIMEOUT.max(launch.boot.timeout).saturating_add(hooks);
        let state = record.hooks.as_ref().map(|_| record.state_at(Status::Creating));
        let create = create_container(launch, dir, &self.inner, state.as_ref(), guest_network);
        let (process, relay) = in_guest(microvm, "creating the container", limit, create).await?;
        let pids: Vec<i32> =
            iter::once(record.sandbox).chain(record.vmm).map(|id| id.pid).collect();
        self.cover.root(mount_view::cover(&launch.bundle, &pids)?).await?;
        // Only now, so that the boot is not limited. Nothing of the container has run yet.
        if let (Some(cgroup), true) = (&record.cgroup, record.bounds_microvm()) {
            cgroup.limit(&CpuLimits::of(&record.resources))?;
        }
        self.timeline.created = Some(clock::monotonic_us());
        record.status = Status::Created;
        Ok(Created { process, relay, record })
    }

    /// Makes the microVM and waits until its agent is ready. Returns the guest's part of the
    /// network's setup.
    async fn boot(
        &mut self,
        record: &mut Record,
        network: Network,
    ) -> Result<Option<agent::Network>> {
        let Launch { id, bundle, boot: settings, spare_nics, .. } = &self.launch;
        let network = self.network.insert(network);
        let guest_network = network.connect(bundle.vm.vcpus, *spare_nics)?;
        let share = self.share.insert(Share::build(id, bundle, &self.dir)?);
        self.inner = share.inner().to_vec();
        self.timeline.shared = Some(clock::monotonic_us());
        let (vmm, connections) = boot::start(id, bundle, settings, &self.dir, share, network)?;
        self.drop_caches = vmm.drop_caches();
        tokio::spawn(share.take_covers().keep(None, self.drop_caches.clone()));
        record.vmm = Some(vmm.id());
        let Microvm::Own(vmm) = self.microvm.insert(Microvm::Own(vmm)) else {
            return Err(Error::new("there is no VMM"));
        };
        record.write(&self.dir)?;
        let resolver = network.has_namespace().then(|| DnsProxy::new(network::RESOLVER));
        let hello = boot::wait_for_agent(vmm, connections, resolver, settings.timeout).await?;
        self.timeline.ready = Some(clock::monotonic_us());
        self.timeline.guest = Some(GuestBoot {
            kernel: hello.kernel,
            init_us: hello.init_us,
            ready_us: hello.ready_us,
            memory_used_kib: hello.memory_used_kib,
        });
        Ok(guest_network)
    }

    /// Moves this process into the cgroup of the sandbox. All later processes of the sandbox
    /// inherit it.
    fn enter_cgroup(&self) -> Result<()> {
        match self.record.as_ref().and_then(|record| record.cgroup.as_ref()) {
            Some(cgroup) => cgroup.enter(),
            None => Ok(()),
        }
    }

    /// The host's file that is the container's /etc/resolv.conf, if the engine mounts one.
    fn resolv_conf(&self) -> Option<PathBuf> {
        let mounts = self.launch.bundle.spec.mounts().as_ref()?;
        let mounted = |bind: &&Bind| {
            mounts.get(bind.mount).is_some_and(|mount| mount.destination() == RESOLV_CONF)
        };
        self.launch.bundle.binds.iter().find(mounted).map(|bind| bind.source.clone())
    }

    /// Makes the container known. The control socket listens before anybody hears of the container.
    async fn announce(&self, created: &Created, launcher: &Launcher) -> Result<UnixListener> {
        let process = serde_json::to_vec(self.launch.bundle.spec.process())
            .explain(|| "cannot write the process".into())?;
        self.dir.write(PROCESS_FILE, &process)?;
        let listener = server::listen(&self.dir)?;
        created.record.write(&self.dir)?;
        if launcher.send(&Message::Created).await {
            return Ok(listener);
        }
        Err(Error::new("the command that created it is gone"))
    }

    /// Hands the container to the task that owns it from now on.
    fn hand_over(self, created: Created) -> Option<Lifecycle> {
        let Created { process, relay, record } = created;
        let Self { dir, timeline, origin, network, share, drop_caches, microvm, .. } = self;
        let (microvm, network) = (microvm?, network?);
        tokio::spawn(drop_caches.serve(process.agent.clone()));
        Some(Lifecycle { dir, record, origin, microvm, network, share, process, relay, timeline })
    }

    /// The record of the container at its beginning.
    fn first_record(&self) -> Result<Record> {
        let launch = &self.launch;
        let sandbox = ProcessId::own().ok_or_else(|| Error::new("cannot read /proc/self/stat"))?;
        Ok(Record {
            version: STATE_VERSION,
            protocols: Protocols::OWN,
            id: launch.id.clone(),
            oci_version: launch.bundle.spec.version().clone(),
            bundle: launch.bundle.dir.clone(),
            rootfs: launch.bundle.rootfs.clone(),
            sandbox,
            vmm: None,
            vm: launch.bundle.vm,
            pod: launch.pod.as_ref().map(|member| member.pod.clone()),
            resources: resources(launch),
            status: Status::Creating,
            created: clock::timestamp(),
            owner_uid: launch.owner_uid,
            annotations: launch
                .bundle
                .spec
                .annotations()
                .iter()
                .flatten()
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect(),
            cgroup: launch.cgroup.as_ref().map(CgroupPlan::plan).transpose()?,
            hooks: launch.bundle.spec.hooks().clone(),
            exit: None,
            error: None,
            lost: false,
            network: None,
        })
    }

    /// Takes everything down and reports the error. Returns the exit status.
    async fn give_up(mut self, error: Error, launcher: &Launcher) -> u8 {
        self.take_down().await;
        let code = error.exit_code();
        launcher.send(&Message::Failed { error }).await;
        code
    }

    async fn take_down(&mut self) {
        match self.microvm.take() {
            Some(Microvm::Own(vmm)) => drop(vmm.stop().await),
            Some(Microvm::Pod(mut vm)) => vm.leave().await,
            None => {}
        }
        self.network = None;
        self.share = None;
        self.remove_cgroup();
        match (self.dir.remove(), &self.record) {
            (Ok(true), Some(record)) => hooks::run_poststop(record, self.origin.as_ref()).await,
            (Ok(_), _) => {}
            (Err(error), _) => log::error!("{error}"),
        }
    }

    fn remove_cgroup(&self) {
        let cgroup = self.record.as_ref().and_then(|record| record.cgroup.as_ref());
        let (Some(cgroup), Some(place)) = (cgroup, &self.launch.cgroup) else { return };
        cgroup.leave(place.caller());
        if let Err(error) = cgroup.remove() {
            log::error!("{error}");
        }
    }
}

/// The limits of config.json, without rules for devices: no update changes these.
fn resources(launch: &Launch) -> LinuxResources {
    let linux = launch.bundle.spec.linux().as_ref();
    let resources = linux.and_then(|linux| linux.resources().clone());
    let mut resources = resources.unwrap_or_default();
    resources.set_devices(None);
    resources
}

/// Has the agent build the container, with its standard streams connected.
async fn create_container(
    launch: &Launch,
    dir: &StateDir,
    inner: &[Inner],
    state: Option<&Value>,
    network: Option<agent::Network>,
) -> Result<(GuestProcess, Relay)> {
    let agent = Agent::connect(dir, &launch.id, String::new()).await?;
    if launch.pod.is_none() {
        let steps = guest_clock::Steps::watch()?;
        let began = Instant::now();
        agent.setup_guest().await?;
        // The guest's clock was set at some moment of this call.
        let ask = began.elapsed() > guest_clock::WELL_SET;
        tokio::spawn(guest_clock::keep(agent.clone(), steps, ask));
    }
    let Ends { local, screen, console } =
        Ends::open(launch.terminal.as_ref(), console_size(launch), &launch.preserved)?;
    stdio::release(if launch.detached { Release::All } else { Release::but_for_messages() })?;
    let (tokens, mut streams) = local.connect(dir).await?;
    if launch.detached {
        streams = streams.with_loss_notice();
    }
    let joins = launch.pod.as_ref().map(|member| member.joins.as_slice()).unwrap_or_default();
    let (id, vcpus) = (launch.id.as_str(), launch.bundle.vm.vcpus);
    let spec = guest_spec(&launch.bundle.spec, id, &launch.bundle.binds, inner, vcpus, joins);
    agent.create_container(&launch.bundle, &spec, state, tokens, screen, network).await?;
    Ok((GuestProcess::new(agent, console), streams.relay()?))
}

/// `process.consoleSize`, if a terminal can have that size.
fn console_size(launch: &Launch) -> Option<Size> {
    let size = launch.bundle.spec.process().as_ref()?.console_size()?;
    let columns = u16::try_from(size.width()).ok()?;
    let rows = u16::try_from(size.height()).ok()?;
    Some(Size { columns, rows }).filter(|size| *size != Size::default())
}

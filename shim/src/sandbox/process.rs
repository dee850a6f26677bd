//! `main` of the sandbox process.

use std::{
    iter,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use isopod_protocol::agent;
use oci_spec::runtime::LinuxResources;
use serde_json::Value;
use tokio::net::UnixListener;

use super::{
    agent::{Agent, Screen},
    boot::{self, in_guest},
    console,
    control::Message,
    forgetting::Forgetting,
    guest_clock,
    hooks::{self, Point, RuntimeNamespace},
    launch::{Descriptors, Given, Launch, Terminal, read_document},
    lifecycle::{Lifecycle, START_TIMEOUT},
    limits,
    machine::Machine,
    oom,
    pod::{PodShare, PodVm},
    resolver::Resolver,
    server::{self, Launcher, Server},
    share::{self, Share},
    signals::Signals,
    stdio::{self, Local, Relay, Release},
    timeline::{GuestBoot, Timeline},
    view::{self, Cover},
};
use crate::{
    bundle::{Bind, Inner, guest_spec},
    cgroup::{CpuLimits, Place},
    clock,
    error::{Error, Explain, Result},
    network::{self, Network},
    state::{PROCESS_FILE, ProcessId, Protocols, Record, STATE_VERSION, StateDir, Status},
    terminal::Size,
};

/// Stack of the thread that does everything: what a first thread has.
const STACK: usize = 8 << 20;

/// Runs the sandbox process with what it was launched with, to its end. Returns its exit status:
/// the container's, if there is one.
///
/// # Errors
///
/// If it cannot even begin; nothing has been made then, and the launching process is told by the
/// end of the connection.
pub fn main(descriptors: Descriptors) -> Result<u8> {
    let began_us = clock::monotonic_us();
    // The kernel calls it by the link that was executed.
    rustix::thread::set_name(c"isopod").explain(|| "cannot set this process's name".into())?;
    let Given { socket, state } = descriptors.take()?;
    limits::raise()?;
    let launch: Launch = read_document(&socket)?;
    launch.preserved.iter().try_for_each(|one| one.guard())?;
    let path = StateDir::path_of(state.as_fd())?;
    // Hooks run where this process comes from.
    let cgroup = launch.cgroup.as_ref().map(Place::caller);
    let origin = launch.spec.hooks().as_ref().map(|_| RuntimeNamespace::open(cgroup)).transpose();
    // Before anything starts a thread: a namespace is entered by one thread at a time.
    let (namespace, origin) = match origin {
        Ok(origin) => (share::enter_namespace().and_then(|()| launch.network.enter()), origin),
        Err(error) => (Err(error), None),
    };
    let (cover, covered) = view::main_thread();
    let work = move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .explain(|| "cannot start the event loop".into())?;
        runtime.block_on(async {
            let launcher = Launcher::new(socket)?;
            // Opened again, since the inherited descriptor is of the old namespace. That one stays
            // open for its lock.
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
                forgetting: Forgetting::default(),
                machine: None,
            };
            Ok(sandbox.run(namespace, launcher).await)
        })
    };
    let worker = thread::Builder::new().name(view::WORKER.to_owned()).stack_size(STACK).spawn(work);
    let worker = worker.explain(|| "cannot start a thread".into())?;
    covered.serve();
    let status = worker.join().unwrap_or_else(|_| Err(Error::new("the sandbox process failed")));
    drop(state);
    status
}

/// What has been made so far, so that all of it can be taken down from any point.
struct Sandbox {
    launch: Launch,
    dir: StateDir,
    timeline: Timeline,
    /// The way back to where this process comes from, if there are hooks.
    origin: Option<RuntimeNamespace>,
    /// The root that others see of this process.
    cover: Cover,
    /// As first written: from then on the container exists.
    record: Option<Record>,
    network: Option<Network>,
    share: Option<Share>,
    /// The mounts inside of those that it shares.
    inner: Vec<Inner>,
    forgetting: Forgetting,
    machine: Option<Machine>,
}

/// What creating a container yields.
struct Created {
    agent: Agent,
    relay: Relay,
    console: Option<OwnedFd>,
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
                    // Cannot be: what was created has a microVM and a network.
                    None => 1,
                }
            }
            Err(error) => self.give_up(error, &launcher).await,
        }
    }

    /// Builds everything, up to a container whose process waits to be started.
    async fn create(&mut self) -> Result<Created> {
        let mut record = self.record()?;
        let network = Network::new(self.launch.network.clone(), self.resolv_conf())?;
        record.network = network.taken();
        self.dir.write_record(&record)?;
        self.record = Some(record.clone());
        if let Err(error) = self.enter_cgroup() {
            record.cgroup = None;
            self.record = Some(record.clone());
            if self.launch.cgroup.as_ref().is_some_and(Place::is_asked_for) {
                return Err(error);
            }
            log::debug!("no cgroup of its own: {error}");
            self.dir.write_record(&record)?;
        }
        for point in [Point::Prestart, Point::CreateRuntime] {
            hooks::run(point, &record, self.origin.as_ref()).await?;
        }
        let process = self.launch.spec.process().as_ref();
        oom::adjust(process.and_then(|process| process.oom_score_adj()))?;
        let guest_network = match &self.launch.pod {
            None => self.boot(&mut record, network).await?,
            Some(member) => {
                self.network = Some(network);
                let mut share = PodShare::attach(&member.pod, &self.launch)?;
                share.keep_covers(self.forgetting.clone());
                self.inner = share.inner().to_vec();
                self.timeline.shared = Some(clock::monotonic_us());
                let vm = PodVm::enter(&self.dir, &self.launch.id, &member.pod, share).await?;
                self.machine = Some(Machine::Pod(vm));
                None
            }
        };
        let Some(machine) = &self.machine else { return Err(Error::new("there is no microVM")) };
        let (launch, dir) = (&self.launch, &self.dir);
        let create_hooks =
            launch.spec.hooks().as_ref().and_then(|h| h.create_container().as_deref());
        // If one of them may take for ever, so may the creation.
        let hooks = hooks::time_limit(create_hooks.unwrap_or_default()).unwrap_or(Duration::MAX);
        let limit = START_TIMEOUT.max(launch.boot_timeout).saturating_add(hooks);
        let state = record.hooks.as_ref().map(|_| record.state_at(Status::Creating));
        let create = create_container(launch, dir, &self.inner, state.as_ref(), guest_network);
        let (agent, relay, console) =
            in_guest(machine, "creating the container", limit, create).await?;
        let pids: Vec<i32> =
            iter::once(record.sandbox).chain(record.vmm).map(|id| id.pid).collect();
        self.cover.root(view::cover(launch, &pids)?).await?;
        // Not earlier: booting takes what it takes, and nothing of the container has run.
        if let (Some(cgroup), true) = (&record.cgroup, record.bounds_microvm()) {
            cgroup.limit(&CpuLimits::of(&record.resources))?;
        }
        self.timeline.created = Some(clock::monotonic_us());
        record.status = Status::Created;
        Ok(Created { agent, relay, console, record })
    }

    /// Makes the microVM and waits until its agent is ready. Returns what the guest has to do for its
    /// network.
    async fn boot(
        &mut self,
        record: &mut Record,
        network: Network,
    ) -> Result<Option<agent::Network>> {
        let network = self.network.insert(network);
        let guest_network = network.connect(self.launch.vm.vcpus, self.launch.spare_nics)?;
        let share = self.share.insert(Share::build(&self.launch, &self.dir)?);
        self.inner = share.inner().to_vec();
        self.timeline.shared = Some(clock::monotonic_us());
        let (vmm, connections) = boot::start(&self.launch, &self.dir, share, network)?;
        self.forgetting = vmm.forgetting();
        tokio::spawn(share.take_covers().keep(None, self.forgetting.clone()));
        record.vmm = Some(vmm.id());
        let Machine::Own(vmm) = self.machine.insert(Machine::Own(vmm)) else {
            return Err(Error::new("there is no VMM"));
        };
        self.dir.write_record(record)?;
        let resolver = network.has_namespace().then(|| Resolver::new(network::RESOLVER));
        let limit = self.launch.boot_timeout;
        let hello = boot::wait_for_agent(vmm, connections, resolver, limit).await?;
        self.timeline.ready = Some(clock::monotonic_us());
        self.timeline.guest = Some(GuestBoot {
            kernel: hello.kernel,
            init_us: hello.init_us,
            ready_us: hello.ready_us,
            memory_used_kib: hello.memory_used_kib,
        });
        Ok(guest_network)
    }

    /// Moves this process into the cgroup of the sandbox, which all its further processes inherit.
    fn enter_cgroup(&self) -> Result<()> {
        match self.record.as_ref().and_then(|record| record.cgroup.as_ref()) {
            Some(cgroup) => cgroup.enter(),
            None => Ok(()),
        }
    }

    /// The file on the host that is the container's /etc/resolv.conf, if the engine mounts one.
    fn resolv_conf(&self) -> Option<PathBuf> {
        let mounts = self.launch.spec.mounts().as_ref()?;
        let mounted = |bind: &&Bind| {
            mounts.get(bind.mount).is_some_and(|mount| mount.destination() == network::RESOLV_CONF)
        };
        self.launch.binds.iter().find(mounted).map(|bind| bind.source.clone())
    }

    /// Lets the world know that the container is created. Whoever hears it can talk to the socket
    /// that is listened on by then.
    async fn announce(&self, created: &Created, launcher: &Launcher) -> Result<UnixListener> {
        let process = serde_json::to_vec(self.launch.spec.process())
            .explain(|| "cannot write the process".into())?;
        self.dir.write(PROCESS_FILE, &process)?;
        let listener = server::listen(&self.dir)?;
        self.dir.write_record(&created.record)?;
        if launcher.send(&Message::Created).await {
            return Ok(listener);
        }
        Err(Error::new("the command that created it is gone"))
    }

    /// The container, to the task that owns it from now on.
    fn hand_over(self, created: Created) -> Option<Lifecycle> {
        let Created { agent, relay, console, record } = created;
        let Self { dir, timeline, origin, network, share, forgetting, machine, .. } = self;
        let (machine, network) = (machine?, network?);
        tokio::spawn(forgetting.serve(agent.clone()));
        Some(Lifecycle {
            dir,
            record,
            origin,
            machine,
            network,
            share,
            agent,
            relay,
            console,
            timeline,
        })
    }

    /// What is known of the container at first.
    fn record(&self) -> Result<Record> {
        let launch = &self.launch;
        let sandbox = ProcessId::own().ok_or_else(|| Error::new("cannot read /proc/self/stat"))?;
        Ok(Record {
            version: STATE_VERSION,
            protocols: Protocols::OWN,
            id: launch.id.clone(),
            oci_version: launch.spec.version().clone(),
            bundle: launch.bundle.clone(),
            rootfs: launch.rootfs.clone(),
            sandbox,
            vmm: None,
            vm: launch.vm,
            pod: launch.pod.as_ref().map(|member| member.pod.clone()),
            resources: resources(launch),
            status: Status::Creating,
            created: clock::timestamp(),
            owner_uid: launch.owner_uid,
            annotations: launch
                .spec
                .annotations()
                .iter()
                .flatten()
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect(),
            cgroup: launch.cgroup.as_ref().map(Place::plan).transpose()?,
            hooks: launch.spec.hooks().clone(),
            exit: None,
            error: None,
            lost: false,
            network: None,
        })
    }

    /// Takes everything down and says why.
    async fn give_up(mut self, error: Error, launcher: &Launcher) -> u8 {
        self.take_down().await;
        let code = error.exit_code();
        launcher.send(&Message::Failed { error }).await;
        code
    }

    async fn take_down(&mut self) {
        match self.machine.take() {
            Some(Machine::Own(vmm)) => drop(vmm.stop().await),
            Some(Machine::Pod(mut vm)) => vm.leave().await,
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

/// The limits of config.json, without rules for devices, which no update changes.
fn resources(launch: &Launch) -> LinuxResources {
    let linux = launch.spec.linux().as_ref();
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
) -> Result<(Agent, Relay, Option<OwnedFd>)> {
    let agent = Agent::connect(dir, &launch.id, String::new()).await?;
    if launch.pod.is_none() {
        let steps = guest_clock::Steps::watch()?;
        let began = Instant::now();
        agent.setup_sandbox().await?;
        // The clock was set at some time since.
        let ask = began.elapsed() > guest_clock::WELL_SET;
        tokio::spawn(guest_clock::keep(agent.clone(), steps, ask));
    }
    let (local, size, console) = match &launch.terminal {
        None => (Local::inherited()?, None, None),
        Some(Terminal::Inherited { size }) => (Local::inherited_terminal()?, *size, None),
        Some(Terminal::Socket { path }) => {
            let size = console_size(launch);
            let console = console::make(path, size)?;
            (Local::terminal(console.as_fd())?, size, Some(console))
        }
    };
    let local = local.with(&launch.preserved)?;
    stdio::release(if launch.detached { Release::All } else { Release::but_for_messages() })?;
    let (tokens, mut streams) = local.connect(dir).await?;
    if launch.detached {
        streams = streams.with_last_words();
    }
    let joins = launch.pod.as_ref().map(|member| member.joins.as_slice()).unwrap_or_default();
    let (id, vcpus) = (launch.id.as_str(), launch.vm.vcpus);
    let spec = guest_spec(&launch.spec, id, &launch.binds, inner, vcpus, joins);
    let screen = Screen::of(launch.terminal.as_ref(), size);
    agent.create_container(launch, &spec, state, tokens, screen, network).await?;
    Ok((agent, streams.relay()?, console))
}

/// `process.consoleSize`, as far as a terminal can have it.
fn console_size(launch: &Launch) -> Option<Size> {
    let size = launch.spec.process().as_ref()?.console_size()?;
    let columns = u16::try_from(size.width()).ok()?;
    let rows = u16::try_from(size.height()).ok()?;
    Some(Size { columns, rows }).filter(|size| *size != Size::default())
}

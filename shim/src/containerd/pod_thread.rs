//! The thread that owns a pod's microVM.
//!
//! It is in the mount and network namespace of the pod, and started the VMM. It has an event loop of
//! its own, so nothing that the pod does keeps a call of containerd waiting. The files of a further
//! container are opened by a thread of their own.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use containerd_shim_protos::api::Mount;
use tokio::{runtime::Handle, sync::oneshot};

use crate::{
    bundle::{
        Bundle, GuestContainer, Holder, PodFiles, Propagation, VmSize, check_allowed,
        is_first_of_pod,
    },
    cgroup::{Cgroup, CgroupPlan},
    container_id::ContainerId,
    containerd::{parked::Parked, rootfs},
    control::server::{self, Server},
    engine::{
        self, Container, Io, NewContainer, NewSandbox, Place, Record, RuntimeNamespace, Sandbox,
    },
    error::{Error, Explain, Result},
    event_loop::{blocking, event_loop},
    logger::{self, Subject},
    microvm::{
        boot::BootSettings,
        disks::{OpenDisk, spare_disks},
        placement::Placement,
        share::{self, Depth, Trees},
    },
    network, oom_score,
    process_id::ProcessId,
    sandbox_process::{Membership, make_holder_root},
    settings,
    state::{CONTAINERD_ROOT, CONTROL_SOCKET, StateDir},
    timeline::Timeline,
};

/// A container that containerd asks for.
pub(super) struct NewTask {
    pub(super) id: ContainerId,
    /// Namespace of containerd.
    pub(super) namespace: String,
    pub(super) bundle: PathBuf,
    pub(super) root: Root,
    pub(super) io: Io,
    /// True to keep the guest's console.
    pub(super) debug: bool,
}

/// The root file system of a new container.
pub(super) enum Root {
    /// Mounts that containerd asks for.
    Mounts(Vec<Mount>),
    /// That of a pod's holder, which executes nothing, and has these files of the pod.
    Holder(PodFiles),
}

impl Root {
    /// Mounts it at `rootfs` in the bundle. The calling thread has a mount namespace of its own.
    pub(super) fn mount(&self, bundle: &Path) -> Result<()> {
        match self {
            Self::Mounts(mounts) => rootfs::mount(mounts, bundle),
            Self::Holder(_) => make_holder_root(&bundle.join(rootfs::NAME)),
        }
    }
}

/// A container that was made for containerd, and what is to be removed with it.
pub(super) struct Made {
    pub(super) container: Container,
    pub(super) dir: Arc<StateDir>,
    /// Namespaces that the hooks run in, if there are hooks.
    pub(super) origin: Option<RuntimeNamespace>,
    /// The root file system.
    pub(super) root: Arc<OwnedFd>,
}

/// A booted microVM, for those who are on other threads.
pub(super) struct Booted {
    pub(super) sandbox: Sandbox,
    /// The pod as the records of its further containers name it.
    pub(super) name: engine::Pod,
    pub(super) size: VmSize,
    pub(super) event_loop: Handle,
    pub(super) vmm: Option<ProcessId>,
}

/// Answer of the thread when the first container is there, or could not be made.
pub(super) type Answer = Result<(Booted, Made, Parked)>;

/// The directory for the state directories of a namespace of containerd.
pub(super) fn root_of(namespace: &str) -> PathBuf {
    Path::new(CONTAINERD_ROOT).join(namespace)
}

/// Number of directories that shims make for the state directories of containers: that of the
/// namespace, that of all namespaces, and that of Isopod.
const ROOTS: usize = 3;

/// Removes the directory of a namespace, and those above it, as far as they are empty. Whoever makes
/// another container makes them anew.
pub(super) fn remove_empty_roots(root: &Path) {
    for dir in root.ancestors().take(ROOTS) {
        let _ = std::fs::remove_dir(dir);
    }
}

/// The pod's thread: boots the microVM, and owns it until it is to end.
pub(super) fn own(
    new: NewTask,
    began_us: u64,
    tell: oneshot::Sender<Answer>,
    closed: oneshot::Receiver<()>,
) {
    let (id, subject) = (new.id.clone(), Subject::of(new.id.as_str()));
    let begun = subject.run(|| begin(&new)).and_then(|bundle| Ok((bundle, event_loop()?)));
    let (bundle, event_loop) = match begun {
        Ok(begun) => begun,
        Err(error) => {
            // Fails if nobody waits.
            let _ = tell.send(Err(error));
            return;
        }
    };
    event_loop.block_on(async {
        let mut closed = closed;
        let timeline = Timeline { command: Some(began_us), ..Timeline::default() };
        let created = first(new, &bundle, timeline, &mut closed);
        let created = logger::about(id.as_str(), created).await;
        let (pod, made, parked, server) = match created {
            Ok(created) => created,
            Err(error) => {
                let _ = tell.send(Err(error));
                return;
            }
        };
        let (sandbox, dir) = (pod.sandbox.clone(), Arc::clone(&made.dir));
        // A caller that has given up has dropped the other end of `closed` too.
        if tell.send(Ok((pod, made, parked))).is_ok() {
            // The end of the sender says the same.
            let _ = closed.await;
        }
        sandbox.stop().await;
        sandbox.ended().await;
        dir.remove_file(CONTROL_SOCKET);
        server.close().await;
    });
}

/// Moves the calling thread into namespaces of its own. Returns the bundle, as it is seen there.
fn begin(new: &NewTask) -> Result<Bundle> {
    share::enter_namespace()?;
    // They end with the namespace.
    new.root.mount(&new.bundle)?;
    let files = match &new.root {
        Root::Mounts(_) => None,
        Root::Holder(files) => Some(files),
    };
    let bundle = Bundle::load_in_pod(&new.bundle, files)?;
    check_allowed(&bundle.spec, settings::allowed_annotations()?)?;
    if !bundle.joined.is_empty() {
        return Err(Error::new(format!(
            "container {} belongs to a pod, and this shim has no pod: its sandbox has to be created \
             first",
            new.id
        )));
    }
    network::enter(&bundle.network)?;
    Ok(bundle)
}

/// Boots the microVM and makes the first container.
async fn first(
    new: NewTask,
    bundle: &Bundle,
    timeline: Timeline,
    closed: &mut oneshot::Receiver<()>,
) -> Result<(Booted, Made, Parked, Server)> {
    let NewTask { id, namespace, io, debug, .. } = new;
    let boot = BootSettings::of_host(debug)?;
    let spare_nics = bundle.nics.map_or_else(settings::nics, Ok)?;
    let spare_disks = spare_disks(bundle)?;
    let path = bundle.spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_deref());
    let plan = CgroupPlan::find(path, CgroupPlan::is_systemds(path), &id)?;
    let origin = origin_of(bundle)?;
    let own = ProcessId::own().ok_or_else(|| Error::new("cannot read /proc/self/stat"))?;
    let root = root_file_system(bundle)?;
    let parked = Parked::new(Arc::clone(&root))?;
    let dir = Arc::new(StateDir::create(&root_of(&namespace), &id)?);
    let record = Record::new(&id, bundle, own, parked.pid());
    let mut place = Place::new(Arc::clone(&dir), record, origin.clone());
    let asked = plan.as_ref().is_some_and(CgroupPlan::is_asked_for);
    let made = async {
        let planned = blocking(move || plan.as_ref().map(CgroupPlan::plan_for_others).transpose());
        let (cgroup, held) = planned.await?.unzip();
        place.record.cgroup = cgroup;
        let network = place.prepare(bundle, Cgroup::make, asked).await?;
        let has_network = network.has_namespace();
        let trees = Trees::open(bundle)?;
        let disks = OpenDisk::open_all(&bundle.disks)?;
        let guest = GuestContainer::new(bundle, &id, trees.inner(), &[]);
        let process = bundle.spec.process().as_ref();
        let asked_score = process.and_then(|process| process.oom_score_adj());
        let sandbox = NewSandbox {
            id: &id,
            bundle,
            settings: &boot,
            dir: Arc::clone(&dir),
            trees,
            spare_nics,
            spare_disks,
            network,
            place: Placement {
                cgroup: place.record.cgroup.as_ref().map(|cgroup| cgroup.dir().to_owned()),
                oom_score_adj: Some(match asked_score {
                    Some(score) if !is_first_of_pod(&place.record.annotations) => score,
                    _ => oom_score::unprotected()?,
                }),
            },
        };
        let mut timeline = timeline;
        let booted = Sandbox::boot(sandbox, &mut timeline, |vmm| {
            place.record.vmm = Some(vmm);
            place.record.write(&place.dir)
        })
        .await?;
        drop(held);
        let listener = server::listen(&dir)?;
        let new = NewContainer {
            record: place.record.clone(),
            dir: Arc::clone(&dir),
            guest,
            disks,
            io,
            loss_notice: false,
            origin: origin.clone(),
            timeline,
        };
        let (sandbox, container) = booted.create(new).await?;
        // Only now, so that the boot is not limited. Nothing of the container has run yet.
        if let Err(error) = place.limit().await {
            sandbox.stop().await;
            sandbox.ended().await;
            return Err(error);
        }
        if has_network {
            // For `kubectl port-forward`.
            container.forward_ports();
        }
        let server = Server::start(listener, sandbox.clone());
        Ok((sandbox, container, server))
    };
    // A dropped future takes down what it has made in the microVM and the share.
    let made = tokio::select! {
        made = made => made,
        _ = closed => Err(Error::new("the shim is ending")),
    };
    match made {
        Ok((sandbox, container, server)) => {
            let at = dir.path().to_owned();
            let name = engine::Pod { sandbox: id, dir: at, process: own, holder: false };
            let vmm = place.record.vmm;
            let (size, event_loop) = (bundle.vm, Handle::current());
            let pod = Booted { sandbox, name, size, event_loop, vmm };
            Ok((pod, Made { container, dir, origin, root }, parked, server))
        }
        Err(error) => {
            place.take_down().await;
            Err(error)
        }
    }
}

/// A further container that is about to be made.
pub(super) struct Member {
    /// It has no pid yet.
    pub(super) record: Record,
    pub(super) guest: GuestContainer,
    pub(super) trees: Trees,
    pub(super) disks: Vec<OpenDisk>,
    pub(super) bundle: Bundle,
    pub(super) origin: Option<RuntimeNamespace>,
    pub(super) root: Arc<OwnedFd>,
}

/// Runs `work` in a new mount namespace, which has all that the host has mounted by now. The pod's
/// own namespace may lack what was mounted after it was made. What `work` mounts ends with the
/// thread, unless something has it open.
pub(super) async fn in_mount_namespace<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (tell, told) = oneshot::channel();
    let subject = Subject::now();
    thread::Builder::new()
        .name("isopod-mounts".to_owned())
        .spawn(move || {
            // Fails if nobody waits.
            let _ = tell.send(subject.run(|| share::enter_namespace().and_then(|()| work())));
        })
        .explain(|| "cannot start a thread for a container".into())?;
    told.await.unwrap_or_else(|_| Err(Error::new("the thread for a container panicked")))
}

/// Reads the bundle of a further container, and opens its trees. The container gets the files of its
/// pod, if these are the shim's.
pub(super) fn open_member(
    id: &ContainerId,
    bundle: &Path,
    pod: engine::Pod,
    size: VmSize,
    pids: &HashMap<i32, ContainerId>,
    files: Option<&PodFiles>,
) -> Result<Member> {
    let mut bundle = Bundle::load_in_pod(bundle, files)?;
    check_allowed(&bundle.spec, settings::allowed_annotations()?)?;
    let joins = bundle.joined.iter().map(|joined| {
        let container = match &joined.holder {
            // The socket of the shim is that of the pod.
            Holder::Pod(_) => &pod.sandbox,
            Holder::Process(pid) => pids.get(pid).ok_or_else(|| {
                Error::new(format!(
                    "linux.namespaces: process {pid} stands for no container of the pod"
                ))
            })?,
        };
        Ok((joined.kind, container.clone()))
    });
    let membership = Membership { joins: joins.collect::<Result<_>>()?, pod, vm: size };
    membership.fit(&mut bundle)?;
    let trees = Trees::open(&bundle)?;
    let disks = OpenDisk::open_all(&bundle.disks)?;
    let guest = GuestContainer::new(&bundle, id, trees.inner(), &membership.joins);
    let own = ProcessId::own().ok_or_else(|| Error::new("cannot read /proc/self/stat"))?;
    let record = Record { pod: Some(membership.pod), ..Record::new(id, &bundle, own, own.pid) };
    let origin = origin_of(&bundle)?;
    let root = root_file_system(&bundle)?;
    Ok(Member { record, guest, trees, disks, bundle, origin, root })
}

/// The namespaces that the hooks of a container run in, if there are hooks. They see the root file
/// system, which this thread's mount namespace alone has.
fn origin_of(bundle: &Bundle) -> Result<Option<RuntimeNamespace>> {
    let hooks = bundle.spec.hooks().is_some();
    hooks.then(RuntimeNamespace::open_with_mounts_of_this_thread).transpose()
}

/// A mount of the root file system of its own, for those who look at the container's pid.
fn root_file_system(bundle: &Bundle) -> Result<Arc<OwnedFd>> {
    let root = bundle.spec.root().as_ref();
    let read_only = root.and_then(|root| root.readonly()).unwrap_or(false);
    share::clone(&bundle.rootfs, Depth::Top, read_only, Propagation::Private).map(Arc::new)
}

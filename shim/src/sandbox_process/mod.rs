//! The sandbox process: what stands for a container on the host, with its pid and its exit status.
//!
//! ```text
//!  isopod create/run ── launch socket ──► sandbox process ── engine ──► isopod-vmm, guest
//!  isopod start/kill/exec/… ─ control.sock ─┘
//! ```
//!
//! `create` and `run` start it by executing `isopod` again, with a [`launch`] document. It enters
//! a mount namespace of its own and the container's network namespace. Then it has the engine boot
//! the microVM and make the container ([`first`]), or the sandbox process of its pod's first
//! container ([`member`]). It exits with the container's exit status, because callers of runc wait
//! for that status.

mod first;
mod holder;
mod launch;
mod member;
mod pod_lookup;
mod streams;

use std::{os::fd::AsFd, sync::Arc, thread};

pub(crate) use self::{
    holder::make_root as make_holder_root, launch::Launch, pod_lookup::Membership,
};
use crate::{
    cgroup::{Cgroup, CgroupPlan},
    clock,
    control::{
        connection::Connection,
        message::Message,
        spawn::{Descriptors, Given, read_document},
    },
    engine::{Ended, Place, Record, RuntimeNamespace},
    error::{Error, Explain, Result},
    event_loop::event_loop,
    limits, logger,
    microvm::{
        mount_view::{self, Cover},
        share,
    },
    network, oom_score,
    process_id::ProcessId,
    signals::Signals,
    state::StateDir,
    timeline::Timeline,
};

/// Stack of the worker thread in bytes: as large as that of a first thread.
const STACK: usize = 8 << 20;

/// Name of the thread that does the work.
const WORKER: &str = "isopod-worker";

/// Runs the sandbox process to its end. Returns its exit status: the container's, if there is one.
///
/// # Errors
///
/// If the sandbox process cannot even begin. Nothing has been made then, and the end of the
/// connection tells the launching process.
pub(crate) fn main(descriptors: Descriptors) -> Result<u8> {
    let began_us = clock::monotonic_us();
    // The kernel names a process after the link that was executed: `exe`.
    rustix::thread::set_name(c"isopod").explain(|| "cannot set this process's name".into())?;
    let Given { socket, state } = descriptors.take()?;
    limits::raise()?;
    let launch: Launch = read_document(&socket)?;
    logger::set_sandbox(launch.pod.as_ref().map_or(&launch.id, |pod| &pod.pod.sandbox).as_str());
    launch.preserved.iter().try_for_each(|one| one.guard())?;
    let path = StateDir::path_of(state.as_fd())?;
    // Hooks run in the namespaces and the cgroup that this process comes from.
    let cgroup = launch.cgroup.as_ref().map(CgroupPlan::caller);
    let hooks = launch.bundle.spec.hooks().as_ref();
    let origin = hooks.map(|_| RuntimeNamespace::open(cgroup)).transpose();
    // Before any thread starts: setns(2) and unshare(2) move one thread only.
    let entered = origin.and_then(|origin| {
        share::enter_namespace()?;
        if launch.holder {
            holder::make_root(&launch.bundle.rootfs)?;
        }
        network::enter(&launch.bundle.network)?;
        Ok(origin)
    });
    let (cover, covered) = mount_view::main_thread();
    let work = move || {
        event_loop()?.block_on(async {
            let launcher = Connection::new(socket)?;
            // Opened again, because the inherited descriptor is of the old mount namespace. The
            // inherited descriptor stays open for its lock.
            let dir = Arc::new(StateDir::adopt(&path, launch.made.clone())?);
            let timeline = Timeline {
                command: Some(launch.command_us),
                sandbox: Some(began_us),
                ..Timeline::default()
            };
            let run = run(&launch, dir, timeline, entered, cover, launcher);
            Ok(logger::about(launch.id.as_str(), run).await)
        })
    };
    let worker = thread::Builder::new().name(WORKER.to_owned()).stack_size(STACK).spawn(work);
    let worker = worker.explain(|| "cannot start a thread".into())?;
    covered.serve();
    let status = worker.join().unwrap_or_else(|_| Err(Error::new("the sandbox process panicked")));
    drop(state);
    status
}

/// A container that was made, and the way in which it is waited for.
enum Created {
    First(first::First),
    Member(member::Member),
}

/// Makes the container and stays until its end. Returns the exit status of this process.
async fn run(
    launch: &Launch,
    dir: Arc<StateDir>,
    timeline: Timeline,
    entered: Result<Option<RuntimeNamespace>>,
    cover: Cover,
    mut launcher: Connection,
) -> u8 {
    let begun = entered.and_then(|origin| Ok((place(launch, &dir, origin)?, Signals::new()?)));
    let (mut place, mut signals) = match begun {
        Ok(begun) => begun,
        Err(error) => {
            if launch.holder {
                holder::remove_root(&launch.bundle.rootfs);
            }
            if let Err(left) = dir.remove() {
                log::error!("{left}");
            }
            return tell_failure(error, &launcher).await;
        }
    };
    // A dropped future takes down what it has made in the microVM and the share.
    let created = tokio::select! {
        created = create(launch, &mut place, timeline) => created,
        error = interruption(&mut launcher, &mut signals) => Err(error),
    };
    let created = match created {
        Ok(created) => {
            let announced = tokio::select! {
                announced = announce(launch, &place, &cover, &launcher) => announced,
                number = signals.next_ending() => Err(interrupted(number)),
            };
            match announced {
                Ok(()) => Ok(created),
                // A container that exists does not end by a drop.
                Err(error) => {
                    created.give_up().await;
                    Err(error)
                }
            }
        }
        Err(error) => Err(error),
    };
    let ended = match created {
        Ok(Created::First(first)) => {
            let launcher = launch.holder.then_some(&mut launcher);
            first.attend(&mut signals, launcher).await
        }
        Ok(Created::Member(member)) => member.attend(&place, &mut signals).await,
        Err(error) => {
            if launch.pod.is_some() {
                member::let_go(&dir).await;
            }
            remove(launch, place).await;
            return tell_failure(error, &launcher).await;
        }
    };
    let Ended { exit, error, .. } = &ended;
    if exit.is_some_and(|exit| exit.oom_killed) {
        let id = &launch.id;
        log::warn!(
            "container {id}: the kernel killed a process of it: it went over its memory limit"
        );
    }
    if launch.holder {
        // Nobody else deletes it.
        remove(launch, place).await;
    }
    let heard = launcher.send(&Message::Ended(Box::new(ended.clone()))).await.is_ok();
    if let Some(error) = error.as_ref().filter(|_| !heard) {
        log::error!("container {}: {error}", launch.id);
    }
    ended.exit_code()
}

/// Removes everything of the container on the host.
async fn remove(launch: &Launch, place: Place) {
    if let (Some(_), Some(plan)) = (&place.record.cgroup, &launch.cgroup) {
        plan.leave();
    }
    if launch.holder {
        holder::remove_root(&launch.bundle.rootfs);
    }
    place.take_down().await;
}

/// Reports why there is no container. Returns the exit status of this process.
async fn tell_failure(error: Error, launcher: &Connection) -> u8 {
    let code = error.exit_code();
    // A launching process that is gone needs no answer.
    let _ = launcher.send(&Message::Failed(error)).await;
    code
}

/// Waits until the creation is not wanted any more.
async fn interruption(launcher: &mut Connection, signals: &mut Signals) -> Error {
    tokio::select! {
        // Until it has heard an answer the launching process sends nothing.
        _ = launcher.receive() => launcher_gone(),
        number = signals.next_ending() => interrupted(number),
    }
}

fn launcher_gone() -> Error {
    Error::new("the command that created it is gone")
}

fn interrupted(number: u32) -> Error {
    Error::new(format!("interrupted by signal {number}"))
}

/// The place of the container. Nothing is made yet.
fn place(launch: &Launch, dir: &Arc<StateDir>, origin: Option<RuntimeNamespace>) -> Result<Place> {
    let own = ProcessId::own().ok_or_else(|| Error::new("cannot read /proc/self/stat"))?;
    let record = Record {
        pod: launch.pod.as_ref().map(|member| member.pod.clone()),
        holder: launch.holder,
        cgroup: launch.cgroup.as_ref().map(CgroupPlan::plan).transpose()?,
        ..Record::new(&launch.id, &launch.bundle, own, own.pid)
    };
    Ok(Place::new(Arc::clone(dir), record, origin))
}

/// The processes of the host that stand for the container.
fn processes(record: &Record) -> Vec<i32> {
    let processes = [Some(record.sandbox), record.vmm].into_iter().flatten();
    processes.map(|process| process.pid).collect()
}

/// Builds everything, up to a container whose process waits to be started.
async fn create(launch: &Launch, place: &mut Place, timeline: Timeline) -> Result<Created> {
    let asked = launch.cgroup.as_ref().is_some_and(CgroupPlan::is_asked_for);
    // Callers of runc look for the cgroup of this process's pid. All later processes of the sandbox
    // inherit it.
    let network = place.prepare(&launch.bundle, Cgroup::enter, asked).await?;
    let process = launch.bundle.spec.process().as_ref();
    oom_score::adjust(process.and_then(|process| process.oom_score_adj()))?;
    Ok(match &launch.pod {
        None => Created::First(first::create(launch, place, network, timeline).await?),
        Some(pod) => Created::Member(member::create(launch, pod, place, timeline).await?),
    })
}

/// Shows the container's files to those who look for them at this process, and tells the launching
/// process that the container is created.
async fn announce(
    launch: &Launch,
    place: &Place,
    cover: &Cover,
    launcher: &Connection,
) -> Result<()> {
    let root = mount_view::cover(&launch.bundle, &processes(&place.record))?;
    cover.root(root).await?;
    // Only now, so that the boot is not limited. Nothing of the container has run yet.
    place.limit().await?;
    launcher.send(&Message::Created).await.map_err(|_| launcher_gone())
}

impl Created {
    /// Ends the container again.
    async fn give_up(self) {
        match self {
            Self::First(first) => first.give_up().await,
            Self::Member(member) => member.give_up().await,
        }
    }
}

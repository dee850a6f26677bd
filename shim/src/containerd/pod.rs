//! A pod, as the calls of containerd use it: its microVM belongs to another thread.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use tokio::{
    runtime::Handle,
    sync::{oneshot, watch},
    time::timeout,
};

use crate::{
    bundle::{PodFiles, VmSize},
    cgroup::Cgroup,
    clock,
    container_id::ContainerId,
    containerd::{
        parked::Parked,
        pod_thread::{
            Booted, Made, Member, NewTask, in_mount_namespace, open_member, own, root_of,
        },
    },
    engine::{self, NewContainer, Place, Record, Sandbox},
    error::{Error, Explain, Result},
    event_loop::blocking,
    logger,
    process_id::ProcessId,
    state::StateDir,
    timeline::Timeline,
};

/// Stack of the pod's thread in bytes: as large as that of a first thread.
const STACK: usize = 8 << 20;

/// Longest time for containers that are being made to be taken down when the pod ends.
const ADD_TIMEOUT: Duration = Duration::from_secs(30);

/// A pod that has a microVM.
pub(super) struct Pod {
    sandbox: Sandbox,
    /// The pod as the records of its further containers name it.
    name: engine::Pod,
    size: VmSize,
    /// Files that the containers get, if the pod's engine leaves these to the shim.
    files: Option<PodFiles>,
    event_loop: Handle,
    thread: Mutex<Option<Owner>>,
    /// Number of further containers that are being made.
    adding: watch::Sender<usize>,
    /// The VMM, for the host's choice of a process to kill when its memory runs out.
    oom_score: Mutex<OomScore>,
}

/// The thread that owns the microVM.
struct Owner {
    /// Dropped to have the thread end the microVM.
    close: oneshot::Sender<()>,
    thread: thread::JoinHandle<()>,
}

impl Pod {
    /// Boots a microVM for a container, and makes the container in it. Gives up when `closing` is
    /// ready. `files` are those of the pod's further containers.
    ///
    /// # Errors
    ///
    /// If the bundle is refused, or the microVM or the container cannot be made. Nothing is left
    /// then.
    pub(super) async fn boot(
        new: NewTask,
        files: Option<PodFiles>,
        closing: impl Future<Output = ()>,
    ) -> Result<(Self, Made, Parked)> {
        let began_us = clock::monotonic_us();
        let (tell, told) = oneshot::channel();
        let (close, closed) = oneshot::channel();
        let thread = thread::Builder::new()
            .name("isopod-pod".to_owned())
            .stack_size(STACK)
            .spawn(move || own(new, began_us, tell, closed))
            .explain(|| "cannot start the thread of a pod".into())?;
        let mut told = told;
        let mut close = Some(close);
        let early = tokio::select! {
            answer = &mut told => Some(answer),
            () = closing => None,
        };
        let answer = match early {
            Some(answer) => answer,
            None => {
                // The thread takes down what it has made, and says so.
                close = None;
                told.await
            }
        };
        let gone = || Err(Error::new("the thread of the pod has ended"));
        let (booted, made, parked) = answer.unwrap_or_else(|_| gone())?;
        let Booted { sandbox, name, size, event_loop, vmm } = booted;
        let pod = Self {
            sandbox,
            name,
            size,
            files,
            event_loop,
            // Without a sender the thread ends the microVM.
            thread: Mutex::new(close.map(|close| Owner { close, thread })),
            adding: watch::Sender::new(0),
            oom_score: Mutex::new(OomScore { vmm, least: None }),
        };
        Ok((pod, made, parked))
    }

    /// Makes a further container. `pids` are the pids that stand for the pod's containers.
    ///
    /// # Errors
    ///
    /// If the bundle is refused, or the container cannot be made. Nothing is left then.
    pub(super) async fn add(
        &self,
        new: NewTask,
        pids: HashMap<i32, ContainerId>,
    ) -> Result<(Made, Parked)> {
        let creating = self.sandbox.reserve(&new.id)?;
        let (name, size) = (self.name.clone(), self.size);
        let timeline = Timeline { command: Some(clock::monotonic_us()), ..Timeline::default() };
        let NewTask { id, namespace, bundle, root, io, .. } = new;
        let opened = {
            let (id, files) = (id.clone(), self.files.clone());
            in_mount_namespace(move || {
                root.mount(&bundle)?;
                open_member(&id, &bundle, name, size, &pids, files.as_ref())
            })
        };
        let Member { record, guest, trees, disks, bundle, origin, root } = opened.await?;
        let _adding = Adding::of(&self.adding);
        let process = bundle.spec.process().as_ref();
        let oom_score = process.and_then(|process| process.oom_score_adj());
        let parked = self.park(Arc::clone(&root)).await?;
        let work = async move {
            let dir = Arc::new(StateDir::create(&root_of(&namespace), &id)?);
            let record = Record { pid: parked.pid(), ..record };
            let mut place = Place::new(Arc::clone(&dir), record, origin.clone());
            let made = async {
                place.prepare(&bundle, Cgroup::make, false).await?;
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
                creating.create(new, trees).await
            };
            match made.await {
                Ok(container) => Ok((Made { container, dir, origin, root }, parked)),
                Err(error) => {
                    place.take_down().await;
                    Err(error)
                }
            }
        };
        let made = self.event_loop.spawn(logger::inherit(work));
        let made = made.await;
        let made = made.unwrap_or_else(|_| Err(Error::new("the microVM of the pod has ended")))?;
        // Whoever panicked has left it whole.
        self.oom_score.lock().unwrap_or_else(PoisonError::into_inner).add(oom_score);
        Ok(made)
    }

    /// The container that the microVM was made for, and ends with it.
    pub(super) fn first(&self) -> &ContainerId {
        &self.name.sandbox
    }

    /// Parks a thread in the pod's namespaces, with the root file system of a container.
    pub(super) async fn park(&self, root: Arc<OwnedFd>) -> Result<Parked> {
        let parked = self.event_loop.spawn(blocking(move || Parked::new(root)));
        parked.await.unwrap_or_else(|_| Err(Error::new("the microVM of the pod has ended")))
    }

    /// Ends the microVM, and waits until everything of it is gone.
    pub(super) async fn close(&self) {
        let Some(Owner { close, thread }) = self.owner().take() else { return };
        // Containers that are being made fail now, and are taken down by the thread.
        self.sandbox.stop().await;
        let mut adding = self.adding.subscribe();
        let _ = timeout(ADD_TIMEOUT, adding.wait_for(|adding| *adding == 0)).await;
        drop(close);
        let ended = tokio::task::spawn_blocking(move || thread.join());
        if !matches!(ended.await, Ok(Ok(()))) {
            log::error!("the thread of the pod panicked");
        }
    }

    fn owner(&self) -> std::sync::MutexGuard<'_, Option<Owner>> {
        // Whoever panicked has left it whole: each change is one assignment.
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A further container that is being made, until this is dropped.
struct Adding<'a>(&'a watch::Sender<usize>);

impl<'a> Adding<'a> {
    fn of(count: &'a watch::Sender<usize>) -> Self {
        count.send_modify(|adding| *adding += 1);
        Self(count)
    }
}

impl Drop for Adding<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|adding| *adding -= 1);
    }
}

/// `oom_score_adj` of a pod's VMM: the least that a container of the pod has. That of the first
/// container is the engine's own, which protects it, and the whole pod's memory is in the VMM.
#[derive(Debug)]
struct OomScore {
    vmm: Option<ProcessId>,
    least: Option<i32>,
}

impl OomScore {
    fn add(&mut self, value: Option<i32>) {
        let Some(value) = value.filter(|value| self.least.is_none_or(|least| *value < least))
        else {
            return;
        };
        self.least = Some(value);
        let Some(vmm) = self.vmm.filter(|vmm| vmm.is_alive()) else { return };
        let file = format!("/proc/{}/oom_score_adj", vmm.pid);
        if let Err(error) = std::fs::write(&file, value.to_string()) {
            log::warn!("cannot write {value} to {file}: {error}");
        }
    }
}

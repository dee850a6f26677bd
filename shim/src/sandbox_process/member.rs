//! A container of a pod: it lives in the microVM of the pod's first container, whose sandbox process
//! owns it. This process stands for it with its pid and its exit status.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use tokio::time::timeout;

use crate::{
    bundle::GuestContainer,
    clock,
    container_id::ContainerId,
    control::{
        attend::Attendance,
        client,
        message::{Create, Message, Verb},
    },
    engine::{Ended, Place, Record, RuntimeNamespace, hooks::creation_limit, lost_with},
    error::{Error, Result},
    event_loop::blocking,
    microvm::{disks::OpenDisk, share::Trees},
    sandbox_process::{launch::Launch, pod_lookup::Membership, streams},
    signals::Signals,
    state::{StateDir, Status},
    text::seconds,
    timeline::Timeline,
};

/// Longest time for the creation in the microVM, without hooks. The guest has less.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(90);

/// A container in the microVM of its pod.
pub(super) struct Member {
    attendance: Attendance,
    /// The first container of the pod.
    first: ContainerId,
    dir: Arc<StateDir>,
    /// The host's end of a new terminal.
    console: Option<OwnedFd>,
}

/// Has the sandbox process of the pod make the container.
pub(super) async fn create(
    launch: &Launch,
    pod: &Membership,
    place: &Place,
    mut timeline: Timeline,
) -> Result<Member> {
    let gone = || {
        let first = &pod.pod.sandbox;
        Error::new(format!("the microVM of container {first} is ending or gone"))
    };
    // The sources of the trees need not be in the other process's mount namespace.
    let trees = Trees::open(&launch.bundle)?;
    let disks = OpenDisk::open_all(&launch.bundle.disks)?;
    let guest = GuestContainer::new(&launch.bundle, &launch.id, trees.inner(), &pod.joins);
    timeline.shared = Some(clock::monotonic_us());
    let connected = Attendance::connect(&place.dir, &launch.id).await;
    let mut attendance = connected.map_err(|error| {
        log::debug!("{error}");
        gone()
    })?;
    let (io, console) = streams::open(launch)?;
    let (io, streams) = io.into_parts();
    let (trees, mounts) = trees.into_parts()?;
    let (read_only_disks, disks) = OpenDisk::into_parts(disks);
    let origin = place.origin.as_ref().map(RuntimeNamespace::descriptors).unwrap_or_default();
    let create = Create {
        record: place.record.clone(),
        dir: place.dir.path().to_owned(),
        guest,
        io,
        loss_notice: launch.detached,
        origin: place.origin.as_ref().map(RuntimeNamespace::plan),
        trees,
        read_only_disks,
        timeline,
    };
    let descriptors: Vec<BorrowedFd<'_>> = streams
        .iter()
        .map(AsFd::as_fd)
        .chain(origin.iter().copied())
        .chain(mounts.iter().map(AsFd::as_fd))
        .chain(disks.iter().map(AsFd::as_fd))
        .collect();
    let hooks = creation_limit(launch.bundle.spec.hooks().as_ref());
    let limit = BEGIN_TIMEOUT.max(launch.boot.timeout).saturating_add(hooks);
    // A signal may have stopped it.
    pod.pod.process.let_go_on();
    let begun = attendance.begin(Verb::Create(Box::new(create)), &descriptors);
    let begun = timeout(limit, begun).await.unwrap_or_else(|_| {
        Err(Error::new(format!(
            "the sandbox process of container {} does not answer within {}",
            pod.pod.sandbox,
            seconds(limit)
        )))
    });
    match begun? {
        Some(()) => {
            let first = pod.pod.sandbox.clone();
            Ok(Member { attendance, first, dir: Arc::clone(&place.dir), console })
        }
        None => Err(gone()),
    }
}

impl Member {
    /// Passes signals on until the container has ended.
    pub(super) async fn attend(self, place: &Place, signals: &mut Signals) -> Ended {
        match self.attendance.attend(signals, self.console.as_ref()).await {
            Ok(Some(Message::Ended(ended))) => *ended,
            Ok(_) => lost(place, &self.first, "its sandbox process has ended"),
            Err(error) => lost(place, &self.first, &error.message),
        }
    }

    /// Has the container ended, and waits until nobody writes the record any more.
    pub(super) async fn give_up(self) {
        let Self { attendance, dir, .. } = self;
        // The sandbox process ends a container whose client is gone.
        drop(attendance);
        let_go(&dir).await;
    }
}

/// Waits until the sandbox process of the pod has let go of a container whose client is gone. It may
/// still be making the container.
pub(super) async fn let_go(dir: &Arc<StateDir>) {
    let dir = Arc::clone(dir);
    if let Err(error) = blocking(move || client::wait_gone(&dir)).await {
        log::warn!("{error}");
    }
}

/// The end of a container whose sandbox process went without a word. It may have written the record
/// before.
fn lost(place: &Place, first: &ContainerId, why: &str) -> Ended {
    let record = Record::read(&place.dir).ok().flatten();
    let exit = record.as_ref().and_then(|record| record.exit);
    let error = exit.is_none().then(|| lost_with(first, Error::new(why)));
    if let (Some(error), Some(mut record)) = (&error, record.filter(|r| r.error.is_none())) {
        record.status = Status::Stopped;
        record.lost = true;
        record.error = Some(error.message.clone());
        record.save(&place.dir);
    }
    Ended { exit, error, timeline: Timeline::default() }
}

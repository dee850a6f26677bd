//! Calls about the guest as a whole.

use std::sync::Arc;

use isopod_protocol::agent::{
    AdjustClockRequest, ClockReading, Disk, DiskRef, Empty, SetupGuestRequest, VolumeContent,
};
use tokio::sync::oneshot;

use crate::clock;
use crate::container::blocking;
use crate::disk;
use crate::error::{Context as _, Error, Result};
use crate::guest::{Guest, power_off};

pub(super) async fn set_up(guest: Arc<Guest>, request: SetupGuestRequest) -> Result<Empty> {
    let set_up = move || {
        guest.set_up(&request.shared_tag, request.realtime_ns, &request.entropy)?;
        Ok(Empty::default())
    };
    // Mounting sends requests to the host and waits for the answers.
    tokio::task::spawn_blocking(set_up).await.map_err(|e| Error::internal(e.to_string()))?
}

pub(super) fn adjust_clock(request: &AdjustClockRequest) -> Result<ClockReading> {
    let realtime_ns = clock::adjust(request.difference_ns, request.gradually)?;
    Ok(ClockReading { realtime_ns, ..ClockReading::default() })
}

pub(super) async fn attach_disk(request: DiskRef) -> Result<Disk> {
    let disk = blocking(move || disk::attach(request.number)).await?;
    let disk::Disk { major, minor, name } = disk;
    Ok(Disk { major, minor, name, ..Disk::default() })
}

pub(super) async fn detach_disk(request: DiskRef) -> Result<Empty> {
    blocking(move || disk::detach(request.number)).await?;
    Ok(Empty::default())
}

pub(super) async fn update_volume(guest: Arc<Guest>, request: VolumeContent) -> Result<Empty> {
    guest.write_volumes(vec![request]).await.map(|()| Empty::default())
}

pub(super) async fn drop_caches(guest: Arc<Guest>) -> Result<Empty> {
    guest.drop_caches().await.map(|()| Empty::default())
}

pub(super) async fn shut_down() -> Result<Empty> {
    let (sender, ended) = oneshot::channel();
    // The runtime's own threads may all be waiting for processes of containers.
    let thread = std::thread::Builder::new().spawn(move || {
        power_off();
        // The caller may have given up.
        let _ = sender.send(());
    });
    thread.context(|| "start a thread to shut down")?;
    // A thread that fails drops its sender.
    let _ = ended.await;
    Err(Error::internal("the guest is still running"))
}

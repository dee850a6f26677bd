//! Calls about processes.

use std::future::Future;
use std::sync::Arc;

use isopod_protocol::agent::{
    Empty, ExecProcessRequest, ProcessExit, ProcessRef, ProcessStarted, ResizeTerminalRequest,
    SignalProcessRequest,
};

use crate::container::exec::Reservation;
use crate::container::terminal::Screen;
use crate::error::{Code, Error, Result};
use crate::guest::Guest;

/// Runs a further process.
///
/// The id is reserved by this function itself and not by the future that it returns. So a
/// DeleteProcess that is sent after the ExecProcess always finds the id.
pub(super) fn exec(
    guest: Arc<Guest>,
    request: ExecProcessRequest,
) -> impl Future<Output = Result<ProcessStarted>> + Send + 'static {
    let reservation = reserve(&guest, &request);
    async move {
        // Claimed even without a reservation, because unclaimed connections stay open for a while.
        let streams = super::claim(&guest.streams, request.streams).await?;
        let reservation = reservation?;
        let size = super::size(&request.terminal_size)?;
        let screen = Screen { size, plain_newlines: request.plain_newlines };
        let reaper = Arc::clone(&guest.reaper);
        let cgroup = (!request.cgroup.is_empty()).then_some(request.cgroup);
        let pid = reservation.exec(reaper, request.process_json, cgroup, streams, screen).await?;
        Ok(ProcessStarted { pid: pid.unsigned_abs(), ..ProcessStarted::default() })
    }
}

fn reserve(guest: &Guest, request: &ExecProcessRequest) -> Result<Reservation> {
    check_exec_id(&request.exec_id)?;
    guest.container(&request.container_id)?.reserve_exec(request.exec_id.clone())
}

/// Refuses the id of the container's first process.
fn check_exec_id(exec_id: &str) -> Result<()> {
    if exec_id.is_empty() {
        return Err(Error::new(Code::InvalidArgument, "exec_id is empty"));
    }
    Ok(())
}

pub(super) async fn wait(guest: Arc<Guest>, request: ProcessRef) -> Result<ProcessExit> {
    let process = guest.container(&request.container_id)?.process(&request.exec_id)?;
    let ended = process.wait().await;
    Ok(ProcessExit {
        status: ended.exit.status,
        signal: ended.exit.signal,
        oom_killed: ended.oom_killed,
        written: ended.written.clone(),
        ..ProcessExit::default()
    })
}

pub(super) async fn signal(guest: Arc<Guest>, request: SignalProcessRequest) -> Result<Empty> {
    let container = guest.container(&request.container_id).map_err(not_yet)?;
    if request.all {
        if !request.exec_id.is_empty() {
            return Err(Error::new(Code::InvalidArgument, "exec_id is given together with all"));
        }
        container.signal_all(request.signal).await?;
    } else {
        container.process(&request.exec_id).map_err(not_yet)?.signal(request.signal)?;
    }
    Ok(Empty::default())
}

/// Reports an object that is still being made as missing. To the sender of a signal, the wrong
/// state means that the process has ended, and nothing else.
fn not_yet(e: Error) -> Error {
    match e.code {
        Code::FailedPrecondition => Error::new(Code::NotFound, e.message),
        _ => e,
    }
}

pub(super) fn delete(guest: &Guest, request: &ProcessRef) -> Result<Empty> {
    check_exec_id(&request.exec_id)?;
    // A container that is missing or still being created has no further processes.
    if let Ok(container) = guest.container(&request.container_id) {
        container.delete_exec(&request.exec_id)?;
    }
    Ok(Empty::default())
}

pub(super) fn resize(guest: &Guest, request: &ResizeTerminalRequest) -> Result<Empty> {
    let process = guest.container(&request.container_id)?.process(&request.exec_id)?;
    if let Some(size) = super::size(&request.size)? {
        process.resize(size)?;
    }
    Ok(Empty::default())
}

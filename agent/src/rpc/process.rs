//! Calls about processes.

use std::sync::Arc;

use isopod_protocol::agent::{
    Empty, ExecProcessRequest, ProcessExit, ProcessRef, ProcessStarted, ResizeTerminalRequest,
    SignalProcessRequest,
};

use crate::container::terminal::Screen;
use crate::error::{Code, Error, Result};
use crate::guest::Guest;

/// Returns only on failure. Otherwise the end of the caller's connection ends the call.
pub(super) async fn hold(guest: Arc<Guest>, request: ProcessRef) -> Result<Empty> {
    if request.exec_id.is_empty() {
        return Err(Error::new(Code::InvalidArgument, "exec_id is empty"));
    }
    let _hold = guest.container(&request.container_id)?.hold(request.exec_id)?;
    // An answered call would say nothing about its caller.
    std::future::pending().await
}

pub(super) async fn exec(guest: Arc<Guest>, request: ExecProcessRequest) -> Result<ProcessStarted> {
    if request.exec_id.is_empty() {
        return Err(Error::new(Code::InvalidArgument, "exec_id is empty"));
    }
    let size = super::size(&request.terminal_size)?;
    let screen = Screen { size, plain_newlines: request.plain_newlines };
    let streams = super::claim(&guest.streams, request.streams).await?;
    let reaper = Arc::clone(&guest.reaper);
    let container = guest.container(&request.container_id)?;
    let cgroup = (!request.cgroup.is_empty()).then_some(request.cgroup);
    let document = request.process_json;
    let pid = container.exec(reaper, request.exec_id, document, cgroup, streams, screen).await?;
    Ok(ProcessStarted { pid: pid.unsigned_abs(), ..ProcessStarted::default() })
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

pub(super) fn resize(guest: &Guest, request: &ResizeTerminalRequest) -> Result<Empty> {
    let process = guest.container(&request.container_id)?.process(&request.exec_id)?;
    if let Some(size) = super::size(&request.size)? {
        process.resize(size)?;
    }
    Ok(Empty::default())
}

//! Calls about processes.

use std::sync::Arc;

use isopod_protocol::agent::{
    Empty, ExecProcessRequest, ProcessExit, ProcessRef, ProcessStarted, ResizeTerminalRequest,
    SignalProcessRequest,
};

use crate::container::terminal::Screen;
use crate::error::{Code, Error, Result};
use crate::sandbox::Sandbox;

/// Never returns unless it fails: its caller's connection ends it.
pub(super) async fn hold(sandbox: Arc<Sandbox>, request: ProcessRef) -> Result<Empty> {
    if request.exec_id.is_empty() {
        return Err(Error::new(Code::InvalidArgument, "exec_id is empty"));
    }
    let _hold = sandbox.container(&request.container_id)?.hold(request.exec_id)?;
    // A call that has been answered would be no sign of a caller.
    std::future::pending().await
}

pub(super) async fn exec(
    sandbox: Arc<Sandbox>,
    request: ExecProcessRequest,
) -> Result<ProcessStarted> {
    if request.exec_id.is_empty() {
        return Err(Error::new(Code::InvalidArgument, "exec_id is empty"));
    }
    let size = super::size(&request.terminal_size)?;
    let screen = Screen { size, plain_newlines: request.plain_newlines };
    let streams = super::claim(&sandbox.streams, request.streams).await?;
    let reaper = Arc::clone(&sandbox.reaper);
    let container = sandbox.container(&request.container_id)?;
    let cgroup = (!request.cgroup.is_empty()).then_some(request.cgroup);
    let document = request.process_json;
    let pid = container.exec(reaper, request.exec_id, document, cgroup, streams, screen).await?;
    Ok(ProcessStarted { pid: pid.unsigned_abs(), ..ProcessStarted::default() })
}

pub(super) async fn wait(sandbox: Arc<Sandbox>, request: ProcessRef) -> Result<ProcessExit> {
    let process = sandbox.container(&request.container_id)?.process(&request.exec_id)?;
    let ended = process.wait().await;
    Ok(ProcessExit {
        status: ended.exit.status,
        signal: ended.exit.signal,
        oom_killed: ended.oom_killed,
        written: ended.written.clone(),
        ..ProcessExit::default()
    })
}

pub(super) async fn signal(sandbox: Arc<Sandbox>, request: SignalProcessRequest) -> Result<Empty> {
    let container = sandbox.container(&request.container_id).map_err(not_yet)?;
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

/// What is still being made does not exist for a signal: to its sender, the wrong state means that
/// the process has ended, and nothing else.
fn not_yet(e: Error) -> Error {
    match e.code {
        Code::FailedPrecondition => Error::new(Code::NotFound, e.message),
        _ => e,
    }
}

pub(super) fn resize(sandbox: &Sandbox, request: &ResizeTerminalRequest) -> Result<Empty> {
    let process = sandbox.container(&request.container_id)?.process(&request.exec_id)?;
    if let Some(size) = super::size(&request.size)? {
        process.resize(size)?;
    }
    Ok(Empty::default())
}

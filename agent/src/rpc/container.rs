//! Calls about containers.

use std::sync::Arc;

use isopod_protocol::agent::{
    ContainerRef, ContainerStats, CreateContainerRequest, Empty, OomKills, ProcessList,
    ProcessStarted, SetupNetworkRequest, UpdateContainerRequest, WaitOomRequest,
};

use crate::container::Document;
use crate::container::seccomp::Filter;
use crate::container::terminal::Screen;
use crate::error::Result;
use crate::sandbox::Sandbox;

pub(super) async fn create(
    sandbox: Arc<Sandbox>,
    request: CreateContainerRequest,
) -> Result<ProcessStarted> {
    let size = super::size(&request.terminal_size)?;
    let screen = Screen { size, plain_newlines: request.plain_newlines };
    let streams = super::claim(&sandbox.streams, request.streams).await?;
    let filter = Filter::of(&request.seccomp_filter, request.seccomp_flags)?;
    let document = Document::of(request.spec_json, &request.state_json, filter)?;
    let id = request.container_id;
    let network = request.network.into_option();
    let memory = request.shared_memory;
    let pid = sandbox.create(id, document, streams, screen, network, memory).await?;
    Ok(ProcessStarted { pid: pid.unsigned_abs(), ..ProcessStarted::default() })
}

pub(super) async fn set_up_network(
    sandbox: Arc<Sandbox>,
    request: SetupNetworkRequest,
) -> Result<Empty> {
    let network = request.network.unwrap_or_default();
    sandbox.container(&request.container_id)?.set_up_network(network).await?;
    Ok(Empty::default())
}

pub(super) async fn start(sandbox: Arc<Sandbox>, request: ContainerRef) -> Result<Empty> {
    sandbox.container(&request.container_id)?.start().await?;
    Ok(Empty::default())
}

pub(super) async fn processes(sandbox: Arc<Sandbox>, request: ContainerRef) -> Result<ProcessList> {
    let processes = sandbox.container(&request.container_id)?.processes().await?;
    Ok(ProcessList { processes, ..ProcessList::default() })
}

pub(super) async fn pause(sandbox: Arc<Sandbox>, request: ContainerRef) -> Result<Empty> {
    sandbox.container(&request.container_id)?.pause().await?;
    Ok(Empty::default())
}

pub(super) async fn resume(sandbox: Arc<Sandbox>, request: ContainerRef) -> Result<Empty> {
    sandbox.container(&request.container_id)?.resume().await?;
    Ok(Empty::default())
}

pub(super) async fn update(
    sandbox: Arc<Sandbox>,
    request: UpdateContainerRequest,
) -> Result<Empty> {
    sandbox.container(&request.container_id)?.update(request.resources_json).await?;
    Ok(Empty::default())
}

pub(super) async fn delete(sandbox: Arc<Sandbox>, request: ContainerRef) -> Result<Empty> {
    sandbox.delete(&request.container_id).await?;
    Ok(Empty::default())
}

pub(super) async fn stats(sandbox: Arc<Sandbox>, request: ContainerRef) -> Result<ContainerStats> {
    sandbox.container(&request.container_id)?.stats().await
}

pub(super) async fn wait_oom(sandbox: Arc<Sandbox>, request: WaitOomRequest) -> Result<OomKills> {
    let (count, ended) = sandbox.container(&request.container_id)?.wait_oom(request.seen).await?;
    Ok(OomKills { count, ended, ..OomKills::default() })
}

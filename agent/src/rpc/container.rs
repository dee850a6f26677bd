//! Calls about containers.

use std::sync::Arc;

use isopod_protocol::agent::{
    ContainerRef, ContainerStats, CreateContainerRequest, Empty, ForwardPortRequest, OomKills,
    ProcessList, ProcessStarted, SetupNetworkRequest, UpdateContainerRequest, WaitOomRequest,
};

use crate::container::Document;
use crate::container::seccomp::SeccompFilter;
use crate::container::terminal::Screen;
use crate::error::{Code, Error, Result};
use crate::guest::{Guest, Sources};

pub(super) async fn create(
    guest: Arc<Guest>,
    request: CreateContainerRequest,
) -> Result<ProcessStarted> {
    let size = super::size(&request.terminal_size)?;
    let screen = Screen { size, plain_newlines: request.plain_newlines };
    let streams = super::claim(&guest.streams, request.streams).await?;
    let filter = SeccompFilter::of(&request.seccomp_filter, request.seccomp_flags)?;
    let document = Document::of(request.spec_json, &request.state_json, filter)?;
    let id = request.container_id;
    let network = request.network.into_option();
    let sources = Sources {
        memory: request.shared_memory,
        volumes: request.volumes,
        sockets: request.host_sockets,
    };
    let pid = guest.create(id, document, streams, screen, network, sources).await?;
    Ok(ProcessStarted { pid: pid.unsigned_abs(), ..ProcessStarted::default() })
}

pub(super) async fn set_up_network(
    guest: Arc<Guest>,
    request: SetupNetworkRequest,
) -> Result<Empty> {
    let network = request.network.unwrap_or_default();
    guest.container(&request.container_id)?.set_up_network(network).await?;
    Ok(Empty::default())
}

pub(super) async fn forward_port(guest: Arc<Guest>, request: ForwardPortRequest) -> Result<Empty> {
    let port = u16::try_from(request.port).map_err(|_| {
        Error::new(Code::InvalidArgument, format!("there is no port {}", request.port))
    })?;
    let stream = guest.streams.claim(request.stream).await?;
    let stream = stream.ok_or_else(|| {
        Error::new(Code::InvalidArgument, "a connection without a stream".to_owned())
    })?;
    let connected = guest.container(&request.container_id)?.connect(port, request.ipv6).await?;
    guest.forwards.start(stream, connected)?;
    Ok(Empty::default())
}

pub(super) async fn start(guest: Arc<Guest>, request: ContainerRef) -> Result<Empty> {
    guest.container(&request.container_id)?.start().await?;
    Ok(Empty::default())
}

pub(super) async fn processes(guest: Arc<Guest>, request: ContainerRef) -> Result<ProcessList> {
    let processes = guest.container(&request.container_id)?.processes().await?;
    Ok(ProcessList { processes, ..ProcessList::default() })
}

pub(super) async fn pause(guest: Arc<Guest>, request: ContainerRef) -> Result<Empty> {
    guest.container(&request.container_id)?.pause().await?;
    Ok(Empty::default())
}

pub(super) async fn resume(guest: Arc<Guest>, request: ContainerRef) -> Result<Empty> {
    guest.container(&request.container_id)?.resume().await?;
    Ok(Empty::default())
}

pub(super) async fn update(guest: Arc<Guest>, request: UpdateContainerRequest) -> Result<Empty> {
    guest.container(&request.container_id)?.update(request.resources_json).await?;
    Ok(Empty::default())
}

pub(super) async fn delete(guest: Arc<Guest>, request: ContainerRef) -> Result<Empty> {
    guest.delete(&request.container_id).await?;
    Ok(Empty::default())
}

pub(super) async fn stats(guest: Arc<Guest>, request: ContainerRef) -> Result<ContainerStats> {
    guest.container(&request.container_id)?.stats().await
}

pub(super) async fn wait_oom(guest: Arc<Guest>, request: WaitOomRequest) -> Result<OomKills> {
    let (count, ended) = guest.container(&request.container_id)?.wait_oom(request.seen).await?;
    Ok(OomKills { count, ended, ..OomKills::default() })
}

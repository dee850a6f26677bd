//! The service of agent.proto, with one file for each kind of object.
//!
//! ttrpc drops the future of a call when its connection closes. But a half-made container has to be
//! finished or taken apart in any case, so the work runs in tasks of its own.

mod container;
mod guest;
mod process;

use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use isopod_protocol::agent::{
    AdjustClockRequest, ClockReading, ContainerRef, ContainerStats, CreateContainerRequest, Disk,
    DiskRef, Empty, ExecProcessRequest, ForwardPortRequest, OomKills, ProcessExit, ProcessList,
    ProcessRef, ProcessStarted, ResizeTerminalRequest, SetupGuestRequest, SetupNetworkRequest,
    SignalProcessRequest, StreamTokens, TerminalSize, UpdateContainerRequest, VolumeContent,
    WaitOomRequest,
};
use isopod_protocol::agent_ttrpc::Agent;
use protobuf::MessageField;
use ttrpc::r#async::TtrpcContext;

use crate::container::stdio::{Connections, Further};
use crate::container::terminal::Size;
use crate::error::{Code, Error, Result};
use crate::guest::Guest;
use crate::stream::Streams;

/// The service.
pub(crate) struct AgentService(pub(crate) Arc<Guest>);

#[async_trait]
impl Agent for AgentService {
    async fn setup_guest(&self, _: &TtrpcContext, r: SetupGuestRequest) -> ttrpc::Result<Empty> {
        self.run(move |guest| guest::set_up(guest, r)).await
    }

    async fn adjust_clock(
        &self,
        _: &TtrpcContext,
        r: AdjustClockRequest,
    ) -> ttrpc::Result<ClockReading> {
        guest::adjust_clock(&r).map_err(status)
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        r: CreateContainerRequest,
    ) -> ttrpc::Result<ProcessStarted> {
        self.run(move |guest| container::create(guest, r)).await
    }

    async fn setup_network(
        &self,
        _: &TtrpcContext,
        r: SetupNetworkRequest,
    ) -> ttrpc::Result<Empty> {
        self.run(move |guest| container::set_up_network(guest, r)).await
    }

    async fn forward_port(&self, _: &TtrpcContext, r: ForwardPortRequest) -> ttrpc::Result<Empty> {
        self.run(move |guest| container::forward_port(guest, r)).await
    }

    async fn start_container(&self, _: &TtrpcContext, r: ContainerRef) -> ttrpc::Result<Empty> {
        self.run(move |guest| container::start(guest, r)).await
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        r: ExecProcessRequest,
    ) -> ttrpc::Result<ProcessStarted> {
        self.run(move |guest| process::exec(guest, r)).await
    }

    async fn wait_process(&self, _: &TtrpcContext, r: ProcessRef) -> ttrpc::Result<ProcessExit> {
        // The call changes nothing, so it may end with its connection.
        process::wait(Arc::clone(&self.0), r).await.map_err(status)
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        r: SignalProcessRequest,
    ) -> ttrpc::Result<Empty> {
        self.run(move |guest| process::signal(guest, r)).await
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        r: ResizeTerminalRequest,
    ) -> ttrpc::Result<Empty> {
        process::resize(&self.0, &r).map_err(status)
    }

    async fn delete_process(&self, _: &TtrpcContext, r: ProcessRef) -> ttrpc::Result<Empty> {
        // Done before the connection's next request is read, as the reservation of an id is.
        process::delete(&self.0, &r).map_err(status)
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        r: ContainerRef,
    ) -> ttrpc::Result<ProcessList> {
        self.run(move |guest| container::processes(guest, r)).await
    }

    async fn pause_container(&self, _: &TtrpcContext, r: ContainerRef) -> ttrpc::Result<Empty> {
        self.run(move |guest| container::pause(guest, r)).await
    }

    async fn resume_container(&self, _: &TtrpcContext, r: ContainerRef) -> ttrpc::Result<Empty> {
        self.run(move |guest| container::resume(guest, r)).await
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        r: UpdateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.run(move |guest| container::update(guest, r)).await
    }

    async fn container_stats(
        &self,
        _: &TtrpcContext,
        r: ContainerRef,
    ) -> ttrpc::Result<ContainerStats> {
        self.run(move |guest| container::stats(guest, r)).await
    }

    async fn wait_oom(&self, _: &TtrpcContext, r: WaitOomRequest) -> ttrpc::Result<OomKills> {
        // The call changes nothing, as above.
        container::wait_oom(Arc::clone(&self.0), r).await.map_err(status)
    }

    async fn delete_container(&self, _: &TtrpcContext, r: ContainerRef) -> ttrpc::Result<Empty> {
        self.run(move |guest| container::delete(guest, r)).await
    }

    async fn attach_disk(&self, _: &TtrpcContext, r: DiskRef) -> ttrpc::Result<Disk> {
        self.run(move |_| guest::attach_disk(r)).await
    }

    async fn detach_disk(&self, _: &TtrpcContext, r: DiskRef) -> ttrpc::Result<Empty> {
        self.run(move |_| guest::detach_disk(r)).await
    }

    async fn update_volume(&self, _: &TtrpcContext, r: VolumeContent) -> ttrpc::Result<Empty> {
        self.run(move |guest| guest::update_volume(guest, r)).await
    }

    async fn drop_caches(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.run(guest::drop_caches).await
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.run(|_| guest::shut_down()).await
    }
}

impl AgentService {
    /// Runs a call in a task of its own. `call` itself runs at once: ttrpc enters the handlers of a
    /// connection in the order of the requests.
    async fn run<T, F>(&self, call: impl FnOnce(Arc<Guest>) -> F) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let task = tokio::spawn(call(Arc::clone(&self.0)));
        task.await.unwrap_or_else(|e| Err(Error::internal(e.to_string()))).map_err(status)
    }
}

fn status(e: Error) -> ttrpc::Error {
    let code = match e.code {
        Code::NotFound => ttrpc::Code::NOT_FOUND,
        Code::PermissionDenied => ttrpc::Code::PERMISSION_DENIED,
        Code::FailedPrecondition => ttrpc::Code::FAILED_PRECONDITION,
        Code::InvalidArgument => ttrpc::Code::INVALID_ARGUMENT,
        Code::Internal => ttrpc::Code::INTERNAL,
    };
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, e.message))
}

async fn claim(streams: &Streams, tokens: MessageField<StreamTokens>) -> Result<Connections> {
    let tokens = tokens.unwrap_or_default();
    let mut further = Vec::new();
    for stream in tokens.further {
        let (input, output) = (stream.input, stream.output);
        let (input, output) = (streams.claim(input).await?, streams.claim(output).await?);
        further.push(Further { input, output });
    }
    Ok(Connections {
        further,
        stdin: streams.claim(tokens.stdin).await?,
        stdout: streams.claim(tokens.stdout).await?,
        stderr: streams.claim(tokens.stderr).await?,
    })
}

/// Converts a size. A missing size, or 0 by 0, gives `None`.
fn size(size: &MessageField<TerminalSize>) -> Result<Option<Size>> {
    let Some(size) = size.as_ref().filter(|size| size.columns != 0 || size.rows != 0) else {
        return Ok(None);
    };
    match (u16::try_from(size.columns), u16::try_from(size.rows)) {
        (Ok(columns), Ok(rows)) => Ok(Some(Size { columns, rows })),
        _ => {
            let why = format!("a terminal cannot be {} by {}", size.columns, size.rows);
            Err(Error::new(Code::InvalidArgument, why))
        }
    }
}

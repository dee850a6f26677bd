//! The service of agent.proto: one file for each kind of object that calls are about.
//!
//! Work runs in tasks of its own, because ttrpc drops the future of a call when its connection
//! goes, and a container half made must be finished or taken apart whoever listens.

mod container;
mod process;
mod sandbox;

use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use isopod_protocol::agent::{
    AdjustClockRequest, ClockReading, ContainerRef, ContainerStats, CreateContainerRequest, Empty,
    ExecProcessRequest, OomKills, ProcessExit, ProcessList, ProcessRef, ProcessStarted,
    ResizeTerminalRequest, SetupNetworkRequest, SetupSandboxRequest, SignalProcessRequest,
    StreamTokens, TerminalSize, UpdateContainerRequest, WaitOomRequest,
};
use isopod_protocol::agent_ttrpc::Agent;
use protobuf::MessageField;
use ttrpc::r#async::TtrpcContext;

use crate::container::stdio::{Connections, Further};
use crate::container::terminal::Size;
use crate::error::{Code, Error, Result};
use crate::sandbox::Sandbox;
use crate::stream::Streams;

/// The service.
pub(crate) struct AgentService(pub(crate) Arc<Sandbox>);

#[async_trait]
impl Agent for AgentService {
    async fn setup_sandbox(
        &self,
        _: &TtrpcContext,
        r: SetupSandboxRequest,
    ) -> ttrpc::Result<Empty> {
        self.run(move |sandbox| sandbox::set_up(sandbox, r)).await
    }

    async fn adjust_clock(
        &self,
        _: &TtrpcContext,
        r: AdjustClockRequest,
    ) -> ttrpc::Result<ClockReading> {
        sandbox::adjust_clock(&r).map_err(status)
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        r: CreateContainerRequest,
    ) -> ttrpc::Result<ProcessStarted> {
        self.run(move |sandbox| container::create(sandbox, r)).await
    }

    async fn setup_network(
        &self,
        _: &TtrpcContext,
        r: SetupNetworkRequest,
    ) -> ttrpc::Result<Empty> {
        self.run(move |sandbox| container::set_up_network(sandbox, r)).await
    }

    async fn start_container(&self, _: &TtrpcContext, r: ContainerRef) -> ttrpc::Result<Empty> {
        self.run(move |sandbox| container::start(sandbox, r)).await
    }

    async fn hold_process(&self, _: &TtrpcContext, r: ProcessRef) -> ttrpc::Result<Empty> {
        // Ends with the connection, which is what it is for.
        process::hold(Arc::clone(&self.0), r).await.map_err(status)
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        r: ExecProcessRequest,
    ) -> ttrpc::Result<ProcessStarted> {
        self.run(move |sandbox| process::exec(sandbox, r)).await
    }

    async fn wait_process(&self, _: &TtrpcContext, r: ProcessRef) -> ttrpc::Result<ProcessExit> {
        // Changes nothing, so a caller that goes away may take it along.
        process::wait(Arc::clone(&self.0), r).await.map_err(status)
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        r: SignalProcessRequest,
    ) -> ttrpc::Result<Empty> {
        self.run(move |sandbox| process::signal(sandbox, r)).await
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        r: ResizeTerminalRequest,
    ) -> ttrpc::Result<Empty> {
        process::resize(&self.0, &r).map_err(status)
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        r: ContainerRef,
    ) -> ttrpc::Result<ProcessList> {
        self.run(move |sandbox| container::processes(sandbox, r)).await
    }

    async fn pause_container(&self, _: &TtrpcContext, r: ContainerRef) -> ttrpc::Result<Empty> {
        self.run(move |sandbox| container::pause(sandbox, r)).await
    }

    async fn resume_container(&self, _: &TtrpcContext, r: ContainerRef) -> ttrpc::Result<Empty> {
        self.run(move |sandbox| container::resume(sandbox, r)).await
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        r: UpdateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.run(move |sandbox| container::update(sandbox, r)).await
    }

    async fn container_stats(
        &self,
        _: &TtrpcContext,
        r: ContainerRef,
    ) -> ttrpc::Result<ContainerStats> {
        self.run(move |sandbox| container::stats(sandbox, r)).await
    }

    async fn wait_oom(&self, _: &TtrpcContext, r: WaitOomRequest) -> ttrpc::Result<OomKills> {
        // Changes nothing, as above.
        container::wait_oom(Arc::clone(&self.0), r).await.map_err(status)
    }

    async fn delete_container(&self, _: &TtrpcContext, r: ContainerRef) -> ttrpc::Result<Empty> {
        self.run(move |sandbox| container::delete(sandbox, r)).await
    }

    async fn forget_files(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.run(sandbox::forget_files).await
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.run(|_| sandbox::shut_down()).await
    }
}

impl AgentService {
    async fn run<T, F>(&self, call: impl FnOnce(Arc<Sandbox>) -> F) -> ttrpc::Result<T>
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

/// A size that was not given, or is 0 by 0, is none.
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

//! The calls of containerd about a pod as a whole: `containerd.runtime.sandbox.v1.Sandbox`.

use std::{collections::HashMap, sync::Arc};

use async_trait::async_trait;
use containerd_shim_protos::{
    sandbox_api::{
        CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
        PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
        SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse,
        StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
        WaitSandboxRequest, WaitSandboxResponse,
    },
    sandbox_async::{Sandbox, create_sandbox},
    ttrpc::{self, Result, r#async::TtrpcContext},
};

use crate::containerd::{
    calls::Shim,
    messages::timestamp,
    service::{call, to_the_end},
};

/// The shim, as containerd calls it about a sandbox.
struct Service(Arc<Shim>);

/// The calls under their name.
pub(super) fn services(shim: &Arc<Shim>) -> HashMap<String, ttrpc::r#async::Service> {
    create_sandbox(Arc::new(Service(Arc::clone(shim))))
}

#[async_trait]
impl Sandbox for Service {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> Result<CreateSandboxResponse> {
        let id = request.sandbox_id.clone();
        let work = Arc::clone(&self.0).create_sandbox(request);
        call("CreateSandbox", &id, to_the_end(work)).await
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> Result<StartSandboxResponse> {
        let id = request.sandbox_id;
        call("StartSandbox", &id, Arc::clone(&self.0).start_sandbox(id.clone())).await
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        request: PlatformRequest,
    ) -> Result<PlatformResponse> {
        self.0.platform(&request.sandbox_id)
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> Result<StopSandboxResponse> {
        // `timeout_secs` needs no regard: the holder has nothing to do before it ends.
        let id = request.sandbox_id;
        let work = Arc::clone(&self.0).stop_sandbox(id.clone());
        call("StopSandbox", &id, to_the_end(work)).await?;
        Ok(StopSandboxResponse::default())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> Result<WaitSandboxResponse> {
        let exited = self.0.wait_sandbox(&request.sandbox_id).await?;
        Ok(WaitSandboxResponse {
            exit_status: exited.status,
            exited_at: Some(timestamp(exited.at)).into(),
            ..WaitSandboxResponse::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> Result<SandboxStatusResponse> {
        self.0.sandbox.status(&request.sandbox_id, request.verbose)
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> Result<PingResponse> {
        self.0.sandbox.ready(&request.sandbox_id)?;
        Ok(PingResponse::default())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> Result<ShutdownSandboxResponse> {
        let id = request.sandbox_id;
        let work = Arc::clone(&self.0).shutdown_sandbox(id.clone());
        call("ShutdownSandbox", &id, to_the_end(work)).await?;
        Ok(ShutdownSandboxResponse::default())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> Result<SandboxMetricsResponse> {
        let id = request.sandbox_id;
        call("SandboxMetrics", &id, self.0.sandbox_metrics(&id)).await
    }
}

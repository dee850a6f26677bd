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

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use containerd_shim_protos::{
        sandbox_async::SandboxClient,
        shim_async::Client,
        ttrpc::{
            r#async::{
                Server,
                transport::{Listener, Socket},
            },
            context,
        },
    };
    use tokio::{
        net::{UnixListener, UnixStream},
        sync::Notify,
    };

    use super::*;
    use crate::containerd::{events::Events, pod_sandbox::PodSandbox, tasks::Tasks};

    #[tokio::test(flavor = "current_thread")]
    async fn a_sandbox_that_nobody_starts_is_taken_back() {
        let shim = Arc::new(Shim {
            namespace: "k8s.io".into(),
            debug: false,
            tasks: Tasks::default(),
            sandbox: PodSandbox::default(),
            events: Events::none(),
            shutdown_asked: AtomicBool::default(),
            shutdown: Notify::new(),
        });
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = Listener::from(UnixListener::bind(&path).unwrap());
        let mut server = Server::new().add_listener(listener).register_service(services(&shim));
        server.start().await.unwrap();
        let stream = UnixStream::connect(&path).await.unwrap();
        let client = SandboxClient::new(Client::new(Socket::new(stream)));
        let context = context::Context::default;

        let status = || SandboxStatusRequest { sandbox_id: "p".into(), ..Default::default() };
        assert!(client.sandbox_status(context(), &status()).await.is_err());
        let bundle = dir.path().join("bundle");
        std::fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let request = CreateSandboxRequest {
            sandbox_id: "p".into(),
            bundle_path: bundle.to_string_lossy().into_owned(),
            ..Default::default()
        };
        client.create_sandbox(context(), &request).await.unwrap();
        assert!(client.create_sandbox(context(), &request).await.is_err());
        let answer = client.sandbox_status(context(), &status()).await.unwrap();
        assert_eq!((answer.state.as_str(), answer.pid), ("SANDBOX_NOTREADY", 0));
        let request = PlatformRequest { sandbox_id: "p".into(), ..Default::default() };
        let platform = client.platform(context(), &request).await.unwrap().platform;
        assert_eq!(platform.os, "linux");
        let request = PingRequest { sandbox_id: "p".into(), ..Default::default() };
        assert!(client.ping_sandbox(context(), &request).await.is_err());
        let request = SandboxMetricsRequest { sandbox_id: "p".into(), ..Default::default() };
        assert!(client.sandbox_metrics(context(), &request).await.is_err());

        // Without a task the shim stays for its sandbox.
        assert!(!shim.tasks.is_idle());
        for _ in 0..2 {
            let request = StopSandboxRequest { sandbox_id: "p".into(), ..Default::default() };
            client.stop_sandbox(context(), &request).await.unwrap();
        }
        let request = WaitSandboxRequest { sandbox_id: "p".into(), ..Default::default() };
        let answer = client.wait_sandbox(context(), &request).await.unwrap();
        assert!(answer.exit_status == 0 && answer.exited_at.is_some());
        let request = StartSandboxRequest { sandbox_id: "p".into(), ..Default::default() };
        assert!(client.start_sandbox(context(), &request).await.is_err());
        let request = ShutdownSandboxRequest { sandbox_id: "p".into(), ..Default::default() };
        client.shutdown_sandbox(context(), &request).await.unwrap();
        shim.shutdown.notified().await;
    }
}

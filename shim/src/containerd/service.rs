//! The calls of containerd: Task, versions 2 and 3, which differ in their names only.

use std::{
    collections::HashMap,
    future::Future,
    sync::{Arc, atomic::Ordering},
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest,
        StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse,
        UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    shim_async::{self, create_task},
    ttrpc::{self, Code, Result, r#async::TtrpcContext},
};

use crate::{
    call_times,
    containerd::{
        calls::Shim,
        messages::timestamp,
        process::Process,
        status::{status, unsupported},
    },
    logger,
};

/// Name of the service that the crate's generated code has, and the older name of the same calls.
const TASK_V3: &str = "containerd.task.v3.Task";
const TASK_V2: &str = "containerd.task.v2.Task";

/// The shim, as containerd calls it.
pub(super) struct Service(Arc<Shim>);

/// The calls under both names.
pub(super) fn services(shim: &Arc<Shim>) -> HashMap<String, ttrpc::r#async::Service> {
    let named = |name: &str| {
        let mut services = create_task(Arc::new(Service(Arc::clone(shim))));
        services.remove(TASK_V3).map(|service| (name.to_owned(), service))
    };
    [TASK_V3, TASK_V2].into_iter().filter_map(named).collect()
}

/// Carries out a call about a task. Its time is counted, and what it logs names the task.
pub(super) async fn call<T>(
    method: &'static str,
    task: &str,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    call_times::timed(call_times::Service::Task, method, logger::about(task, work)).await
}

/// Runs a call to its end, even if the connection that it came on breaks.
pub(super) async fn to_the_end<T: Send + 'static>(
    call: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    tokio::spawn(logger::inherit(call))
        .await
        .unwrap_or_else(|_| Err(status(Code::INTERNAL, "the call panicked in the shim")))
}

#[async_trait]
impl shim_async::Task for Service {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> Result<StateResponse> {
        let bundle = self.0.task(&request.id)?.bundle.clone();
        self.0.on_process(&request.id, &request.exec_id, |process| process.state(&bundle))
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> Result<CreateTaskResponse> {
        let id = request.id.clone();
        call("Create", &id, to_the_end(Arc::clone(&self.0).create(request))).await
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Result<StartResponse> {
        let StartRequest { id, exec_id, .. } = request;
        match exec_id.as_str() {
            "" => {
                let (shim, task) = (Arc::clone(&self.0), id.clone());
                call("Start", &id, to_the_end(async move { shim.start_task(&task).await })).await
            }
            // A caller that goes away gives the process up.
            exec_id => call("StartExec", &id, self.0.start_exec(&id, exec_id)).await,
        }
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Result<DeleteResponse> {
        let DeleteRequest { id, exec_id, .. } = request;
        let (shim, task) = (Arc::clone(&self.0), id.clone());
        match exec_id.as_str() {
            "" => call("Delete", &id, to_the_end(shim.delete_task(task))).await,
            _ => {
                let work = async move { shim.delete_exec(&task, &exec_id).await };
                call("DeleteExec", &id, to_the_end(work)).await
            }
        }
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Result<PidsResponse> {
        call("Pids", &request.id, self.0.pids(&request.id)).await
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Result<Empty> {
        call("Pause", &request.id, self.0.pause(&request.id)).await
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Result<Empty> {
        call("Resume", &request.id, self.0.resume(&request.id)).await
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Result<Empty> {
        Err(unsupported("checkpoints: there is no CRIU for microVMs"))
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Result<Empty> {
        let id = request.id.clone();
        call("Kill", &id, self.0.kill(request)).await
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Result<Empty> {
        let id = request.id.clone();
        call("Exec", &id, self.0.add_exec(request)).await
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Result<Empty> {
        let id = request.id.clone();
        call("ResizePty", &id, self.0.resize(request)).await
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Result<Empty> {
        if request.stdin {
            self.0.on_process(&request.id, &request.exec_id, Process::close_input)?;
        }
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> Result<Empty> {
        let id = request.id.clone();
        call("Update", &id, self.0.update(request)).await
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Result<WaitResponse> {
        let exited = self.0.wait(&request.id, &request.exec_id).await?;
        Ok(WaitResponse {
            exit_status: exited.status,
            exited_at: Some(timestamp(exited.at)).into(),
            ..WaitResponse::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Result<StatsResponse> {
        call("Stats", &request.id, self.0.stats(&request.id)).await
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> Result<ConnectResponse> {
        let task_pid = self.0.tasks.get(&request.id).map_or(0, |task| task.init.pid());
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..ConnectResponse::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Result<Empty> {
        // It comes after each task. Others may be left.
        self.0.shutdown_asked.store(true, Ordering::Relaxed);
        if self.0.tasks.is_idle() {
            self.0.shutdown.notify_one();
        }
        Ok(Empty::default())
    }
}

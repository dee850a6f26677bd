//! The calls of containerd about the pod's sandbox, carried out.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{
    sandbox_api::{
        CreateSandboxRequest, CreateSandboxResponse, PlatformResponse, SandboxMetricsResponse,
        StartSandboxResponse,
    },
    ttrpc::{Code, Result},
};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use crate::{
    bundle::{Bundle, PodFiles, check_allowed},
    container_id::ContainerId,
    containerd::{
        calls::{ANSWER_TIMEOUT, IDLE_TIME, Shim},
        cri,
        exec::within,
        messages::{CGROUPS, any, timestamp},
        metrics::metrics,
        pod::Pod,
        pod_sandbox::{Phase, Plan, Ready, Stopped},
        pod_spec::pod_spec,
        pod_thread::{NewTask, Root},
        process::Exited,
        sandbox_figures::figures,
        service::to_the_end,
        status::{failed, status, unsupported},
        tasks::{remove_cgroup, remove_state},
    },
    engine::{Request, stdio::StandardStreams},
    error::{Error, Explain},
    event_loop::blocking,
    logger, settings,
    state::write_whole,
};

/// Link in the bundle of containerd to a directory on disk, which goes with the bundle. The bundle
/// itself is in memory, where few kernels map owners for a pod with a user namespace.
const WORK: &str = "work";

/// Longest time for a sandbox to end in order.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// The platform of the guest, by its names in OCI images.
const PLATFORM: (&str, &str) =
    ("linux", if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" });

impl Shim {
    pub(super) async fn create_sandbox(
        self: Arc<Self>,
        request: CreateSandboxRequest,
    ) -> Result<CreateSandboxResponse> {
        if !request.rootfs.is_empty() {
            return Err(unsupported(
                "a root file system of a sandbox: only its containers have one",
            ));
        }
        let _order = self.sandbox.order.lock().await;
        if self.sandbox.exists() || !self.tasks.is_idle() {
            return Err(status(Code::ALREADY_EXISTS, "the shim has a pod already"));
        }
        let planned = blocking(move || plan(&request)).await.map_err(|error| {
            self.end_if_unused();
            failed(error)
        })?;
        self.tasks.are_of_a_sandbox();
        self.sandbox.set(Phase::Created(Arc::new(planned)));
        self.end_if_unused();
        Ok(CreateSandboxResponse::default())
    }

    /// Ends the shim if nobody starts its sandbox. containerd may have given up what it wanted.
    fn end_if_unused(self: &Arc<Self>) {
        let shim = Arc::clone(self);
        tokio::spawn(async move {
            sleep(IDLE_TIME).await;
            let empty = !shim.sandbox.exists() && shim.tasks.is_idle();
            if empty || shim.sandbox.is_unused() {
                shim.shutdown.notify_one();
            }
        });
    }

    /// Boots the microVM. A caller that goes away gives the sandbox up.
    pub(super) async fn start_sandbox(self: Arc<Self>, id: String) -> Result<StartSandboxResponse> {
        // Dropped with this call.
        let (caller, called) = watch::channel(());
        let started = to_the_end(self.boot_sandbox(id, called)).await;
        drop(caller);
        started
    }

    async fn boot_sandbox(
        self: Arc<Self>,
        id: String,
        called: watch::Receiver<()>,
    ) -> Result<StartSandboxResponse> {
        let _order = self.sandbox.order.lock().await;
        let plan = match self.sandbox.phase(&id)? {
            Phase::Created(plan) => plan,
            _ => {
                let text = format!("sandbox {id} has been started or stopped before");
                return Err(status(Code::FAILED_PRECONDITION, text));
            }
        };
        let new = NewTask {
            id: plan.id.clone(),
            namespace: self.namespace.clone(),
            bundle: plan.bundle.clone(),
            root: Root::Holder(plan.files.of_holder()),
            io: StandardStreams::default().into(),
            debug: self.debug,
        };
        let (closing, mut gone) = (self.tasks.closing(), called.clone());
        let given_up = async move {
            tokio::select! {
                () = closing => {}
                // The value never changes.
                _ = gone.changed() => {}
            }
        };
        let mut place = self.tasks.pod().lock().await;
        let booted = Pod::boot(new, Some(plan.files.clone()), given_up).await;
        let (pod, made, parked) = booted.map_err(|error| {
            self.end_if_unused();
            failed(error)
        })?;
        let pod = Arc::new(pod);
        *place = Some(Arc::clone(&pod));
        drop(place);
        let ready = Arc::new(Ready {
            id: plan.id.clone(),
            created: SystemTime::now(),
            pod,
            container: made.container,
            dir: made.dir,
            parked,
            stopping: AtomicBool::default(),
        });
        self.sandbox.set(Phase::Ready(Arc::clone(&ready)));
        self.watch_sandbox(&ready);
        if called.has_changed().is_err() {
            // containerd knows nothing of it, and asks for nothing any more.
            let stopped = self.stop_ready(&ready).await;
            self.shutdown.notify_one();
            stopped?;
            let text = format!("the start of sandbox {id} was given up");
            return Err(status(Code::CANCELLED, text));
        }
        Ok(StartSandboxResponse {
            pid: ready.pid(),
            created_at: Some(timestamp(ready.created)).into(),
            ..StartSandboxResponse::default()
        })
    }

    /// Takes the sandbox down when its microVM ends, in whatever way.
    fn watch_sandbox(self: &Arc<Self>, ready: &Arc<Ready>) {
        let (shim, ready) = (Arc::clone(self), Arc::clone(ready));
        let id = ready.id.clone();
        let watching = async move {
            let ended = ready.container.ended().await;
            let at = SystemTime::now();
            let status = if ready.is_stopping() { 0 } else { ended.exit_code().into() };
            if let Some(error) = ended.error.as_ref().filter(|_| !ready.is_stopping()) {
                log::error!("sandbox {}: {error}", ready.id);
            }
            ready.pod.close().await;
            // The record stays until the shutdown: it leads to what a killed shim leaves.
            if let Err(error) = remove_cgroup(&ready.dir).await {
                log::error!("{error}");
            }
            shim.sandbox.set(Phase::Stopped(Arc::new(Stopped {
                id: ready.id.clone(),
                created: Some(ready.created),
                exited: Exited { status, at },
                dir: Some(Arc::clone(&ready.dir)),
            })));
        };
        tokio::spawn(async move { logger::about(id.as_str(), watching).await });
    }

    pub(super) async fn stop_sandbox(self: Arc<Self>, id: String) -> Result<()> {
        let _order = self.sandbox.order.lock().await;
        self.stop(&id).await
    }

    /// Stops the sandbox, whose order is held.
    async fn stop(&self, id: &str) -> Result<()> {
        match self.sandbox.phase(id)? {
            Phase::Ready(ready) => self.stop_ready(&ready).await,
            Phase::Created(plan) => {
                let exited = Exited { status: 0, at: SystemTime::now() };
                let id = plan.id.clone();
                let stopped = Stopped { id, created: None, exited, dir: None };
                self.sandbox.set(Phase::Stopped(Arc::new(stopped)));
                Ok(())
            }
            Phase::Absent | Phase::Stopped(_) => Ok(()),
        }
    }

    async fn stop_ready(&self, ready: &Ready) -> Result<()> {
        ready.note_stop();
        // With the holder all containers end, and the guest shuts down in order.
        if let Err(error) = ready.container.ask(Request::Destroy).await {
            log::debug!("{error}");
        }
        if timeout(STOP_TIMEOUT, self.sandbox.stopped()).await.is_ok() {
            return Ok(());
        }
        log::warn!("sandbox {} does not end in order: its microVM is ended", ready.id);
        ready.pod.close().await;
        if timeout(STOP_TIMEOUT, self.sandbox.stopped()).await.is_ok() {
            return Ok(());
        }
        Err(failed(Error::new(format!("sandbox {} does not end", ready.id))))
    }

    pub(super) async fn wait_sandbox(&self, id: &str) -> Result<Exited> {
        self.sandbox.phase(id)?;
        Ok(self.sandbox.stopped().await.exited)
    }

    /// Ends the shim with its sandbox, or without one if there never was one.
    pub(super) async fn shutdown_sandbox(self: Arc<Self>, id: String) -> Result<()> {
        if !self.sandbox.exists() && self.tasks.is_idle() {
            self.shutdown.notify_one();
            return Ok(());
        }
        self.sandbox.phase(&id)?;
        // Nobody waits for a start that is under way.
        self.tasks.give_up_boot();
        let _order = self.sandbox.order.lock().await;
        // What cannot be stopped ends with the shim.
        if let Err(error) = self.stop(&id).await {
            log::error!("{error}");
        }
        if let Phase::Stopped(stopped) = self.sandbox.phase(&id)?
            && let Some(dir) = &stopped.dir
            // Otherwise the action `delete` finds the tasks by it.
            && self.tasks.is_empty()
            && let Err(error) = remove_state(dir, None).await
        {
            log::error!("{error}");
        }
        self.shutdown.notify_one();
        Ok(())
    }

    pub(super) fn platform(&self, id: &str) -> Result<PlatformResponse> {
        self.sandbox.phase(id)?;
        let mut answer = PlatformResponse::default();
        let platform = answer.platform.mut_or_insert_default();
        let (os, architecture) = PLATFORM;
        os.clone_into(&mut platform.os);
        architecture.clone_into(&mut platform.architecture);
        Ok(answer)
    }

    pub(super) async fn sandbox_metrics(&self, id: &str) -> Result<SandboxMetricsResponse> {
        let ready = self.sandbox.ready(id)?;
        let read = within(ANSWER_TIMEOUT, figures(&ready.container, &ready.dir)).await;
        let read = read.map_err(failed)?;
        let mut answer = SandboxMetricsResponse::default();
        let metric = answer.metrics.mut_or_insert_default();
        id.clone_into(&mut metric.id);
        metric.timestamp = Some(timestamp(SystemTime::now())).into();
        metric.data = Some(any(CGROUPS, &metrics(&read))).into();
        Ok(answer)
    }
}

/// Writes the files of the sandbox that a request asks for, and checks them.
fn plan(request: &CreateSandboxRequest) -> crate::error::Result<Plan> {
    let id = ContainerId::parse(&request.sandbox_id)?;
    let mut config = cri::decode(request.options.as_ref())?;
    for (key, value) in &request.annotations {
        config.annotations.entry(key.clone()).or_insert_with(|| value.clone());
    }
    let hostname = match config.hostname.as_str() {
        "" => rustix::system::uname().nodename().to_string_lossy().into_owned(),
        name => name.to_owned(),
    };
    let bundle = PathBuf::from(&request.bundle_path);
    let spec = pod_spec(id.as_str(), &config, &hostname, &request.netns_path)?;
    let file = bundle.join("config.json");
    write_whole(&file, spec.to_string().as_bytes())
        .explain(|| format!("cannot write {}", file.display()))?;
    // What is refused is refused before anything is made.
    let loaded = Bundle::load(&bundle, None)?;
    check_allowed(&loaded.spec, settings::allowed_annotations()?)?;
    let resolv_conf = cri::resolv_conf(config.dns_config.as_ref());
    let dir = directory(&bundle);
    let files = PodFiles::write(&dir, &hostname, resolv_conf.as_deref())?;
    Ok(Plan { id, bundle, files })
}

/// Directory for the pod's files.
fn directory(bundle: &Path) -> PathBuf {
    fs::canonicalize(bundle.join(WORK)).unwrap_or_else(|_| bundle.to_owned())
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::protobuf::{MessageField, well_known_types::any::Any};

    use super::*;

    #[test]
    fn a_plan_has_its_files_on_disk() {
        let (bundle, disk) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir(bundle.path().join("rootfs")).unwrap();
        std::os::unix::fs::symlink(disk.path(), bundle.path().join(WORK)).unwrap();
        let mut request = CreateSandboxRequest {
            sandbox_id: "p".into(),
            bundle_path: bundle.path().to_string_lossy().into_owned(),
            ..CreateSandboxRequest::default()
        };
        let planned = plan(&request).unwrap();
        assert_eq!(planned.id.as_str(), "p");
        for name in ["hostname", "hosts", "resolv.conf", "shm"] {
            assert!(disk.path().join(name).exists(), "{name}");
        }
        // Annotations of Isopod have to be allowed, by whichever way they come.
        request.annotations.insert("dev.isopod.nested".into(), "true".into());
        assert!(plan(&request).err().unwrap().message.contains("dev.isopod.nested"));
        request.annotations.clear();
        request.options = MessageField::some(Any { type_url: "x".into(), ..Any::default() });
        assert!(plan(&request).err().unwrap().message.contains("options of the sandbox"));
    }
}

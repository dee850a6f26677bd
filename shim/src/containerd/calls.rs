//! The calls of containerd, carried out.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use containerd_shim_protos::{
    api::{
        CreateTaskRequest, CreateTaskResponse, DeleteResponse, Empty, ExecProcessRequest,
        KillRequest, PidsResponse, ProcessInfo, ResizePtyRequest, StartResponse, StatsResponse,
        UpdateTaskRequest,
    },
    events::task::{TaskCreate, TaskExecAdded, TaskIO, TaskPaused, TaskResumed, TaskStart},
    shim::oci::ProcessDetails,
    topics,
    ttrpc::{Code, Result},
};
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};

use crate::{
    bundle,
    container_id::ContainerId,
    containerd::{
        events::Events,
        exec::{Exec, sent, within},
        messages::{CGROUPS, RUNC, any, same, timestamp},
        metrics::metrics,
        pod::Pod,
        pod_sandbox::PodSandbox,
        pod_thread::{NewTask, Root},
        process::{Exited, Process, Status},
        status::{failed, finished, no_such, status, unsupported},
        stdio::{Addresses, Of},
        tasks::{Exists, OUTPUT_TIMEOUT, Task, Tasks},
    },
    engine::{ExecSpec, Request},
    error::{Error, ErrorKind},
    event_loop::blocking,
    terminal::Size,
};

/// Added to the guest's pids of processes that have none on the host. No process of the host has
/// such a pid (`PID_MAX_LIMIT` is 2^22), so nobody takes them for processes of the host.
const GUEST_PIDS: u32 = 1 << 30;

/// Longest time for the guest to carry a call out that is quick. Callers go on to stronger means.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest time for the guest's part of an answer that can do without. containerd asks all shims,
/// one after the other, while it starts.
const LOOK_TIMEOUT: Duration = Duration::from_secs(1);

/// Longest time for the end of a process to be told that a signal came too late for.
const END_TIME: Duration = Duration::from_millis(500);

/// Time for the answer about the last task to be sent before the shim ends.
const ANSWER_TIME: Duration = Duration::from_secs(1);

/// Longest time of a shim without a task or a sandbox. containerd may have given up what it wanted.
pub(super) const IDLE_TIME: Duration = Duration::from_secs(30);

/// State that all calls share.
pub(super) struct Shim {
    pub(super) namespace: String,
    pub(super) debug: bool,
    pub(super) tasks: Tasks,
    /// The sandbox, if containerd has the shim make one.
    pub(super) sandbox: PodSandbox,
    pub(super) events: Events,
    /// True once containerd has wanted the shim to end.
    pub(super) shutdown_asked: AtomicBool,
    /// Notified when the shim is to end.
    pub(super) shutdown: Notify,
}

impl Shim {
    pub(super) fn task(&self, id: &str) -> Result<Arc<Task>> {
        self.tasks.get(id).ok_or_else(|| no_such(id, ""))
    }

    fn exec(&self, id: &str, exec_id: &str) -> Result<Arc<Exec>> {
        self.task(id)?.exec(exec_id).ok_or_else(|| no_such(id, exec_id))
    }

    /// Runs an action on the process that a call names.
    pub(super) fn on_process<T>(
        &self,
        id: &str,
        exec_id: &str,
        action: impl FnOnce(&Process) -> T,
    ) -> Result<T> {
        Ok(match exec_id {
            "" => action(&self.task(id)?.init),
            _ => action(&self.exec(id, exec_id)?.process),
        })
    }

    pub(super) async fn wait(&self, id: &str, exec_id: &str) -> Result<Exited> {
        Ok(match exec_id {
            "" => self.task(id)?.init.wait().await,
            _ => self.exec(id, exec_id)?.process.wait().await,
        })
    }

    pub(super) async fn create(
        self: Arc<Self>,
        request: CreateTaskRequest,
    ) -> Result<CreateTaskResponse> {
        if !request.checkpoint.is_empty() {
            return Err(unsupported("a task from a checkpoint: there is no CRIU for microVMs"));
        }
        let id = ContainerId::parse(&request.id).map_err(failed)?;
        let creation = self.tasks.begin(&request.id).map_err(|Exists| {
            status(Code::ALREADY_EXISTS, format!("there is a task {id} already"))
        })?;
        let addresses = Addresses {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let opened = {
            let (addresses, id) = (addresses.clone(), request.id.clone());
            let namespace = self.namespace.clone();
            blocking(move || addresses.open(Of { id: &id, namespace: &namespace }, None)).await
        };
        let (io, kept) = opened.map_err(failed)?;
        let new = NewTask {
            id: id.clone(),
            namespace: self.namespace.clone(),
            bundle: PathBuf::from(&request.bundle),
            root: Root::Mounts(request.rootfs.clone()),
            io,
            debug: self.debug,
        };
        // The first creation boots the pod, and others wait for it.
        let mut place = self.tasks.pod().lock().await;
        let (pod, made, parked) = match place.clone() {
            Some(pod) => {
                drop(place);
                self.check_pod(&pod)?;
                let mut pids = self.tasks.pids();
                pids.extend(self.sandbox.pid());
                let (made, parked) = pod.add(new, pids).await.map_err(failed)?;
                (pod, made, parked)
            }
            None => {
                self.sandbox.check_absent()?;
                let booted = Pod::boot(new, None, self.tasks.closing()).await;
                let (pod, made, parked) = booted.map_err(failed)?;
                let pod = Arc::new(pod);
                *place = Some(Arc::clone(&pod));
                drop(place);
                (pod, made, parked)
            }
        };
        let init = Process::new(&request.id, "", addresses, parked);
        init.keep(kept);
        let pid = init.pid();
        let task = Arc::new(Task::new(id, request.bundle.clone(), init, made, pod));
        if creation.is_abandoned() {
            // containerd has deleted it already, and knows nothing of it.
            let nobody = Events::none();
            self.tasks.add(Arc::clone(&task));
            task.watch(&nobody);
            let removed = self.tasks.delete(&task, &nobody).await;
            removed.map_err(failed)?;
            let text = format!("task {} was deleted while it was created", request.id);
            return Err(status(Code::CANCELLED, text));
        }
        let event = TaskCreate {
            container_id: request.id,
            bundle: request.bundle,
            rootfs: request.rootfs.iter().filter_map(same).collect(),
            io: Some(TaskIO {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
                ..TaskIO::default()
            })
            .into(),
            pid,
            ..TaskCreate::default()
        };
        self.events.send(topics::TASK_CREATE_EVENT_TOPIC, &event);
        self.tasks.add(Arc::clone(&task));
        drop(creation);
        task.watch(&self.events);
        Ok(CreateTaskResponse { pid, ..CreateTaskResponse::default() })
    }

    /// Refuses a container in a pod that has ended.
    fn check_pod(&self, pod: &Pod) -> Result<()> {
        if self.sandbox.exists() {
            return self.sandbox.check_ready();
        }
        let first = pod.first();
        let there = self.tasks.get(first.as_str());
        if there.is_some_and(|first| first.init.exited().is_none()) {
            return Ok(());
        }
        let text = format!("the pod has ended with its first container, {first}");
        Err(status(Code::FAILED_PRECONDITION, text))
    }

    pub(super) async fn start_task(&self, id: &str) -> Result<StartResponse> {
        let task = self.task(id)?;
        let init = &task.init;
        let _order = init.order.lock().await;
        if init.status() != Status::Created {
            let text = format!("task {id} has been started before");
            return Err(status(Code::FAILED_PRECONDITION, text));
        }
        task.container.ask(Request::Start).await.map_err(failed)?;
        init.set_status(Status::Running);
        let pid = init.pid();
        let event = TaskStart { container_id: id.to_owned(), pid, ..TaskStart::default() };
        self.events.send(topics::TASK_START_EVENT_TOPIC, &event);
        Ok(StartResponse { pid, ..StartResponse::default() })
    }

    pub(super) async fn start_exec(&self, id: &str, exec_id: &str) -> Result<StartResponse> {
        let task = self.task(id)?;
        let exec = self.exec(id, exec_id)?;
        if task.init.status() == Status::Paused {
            let text = format!("task {id} is paused: resume it first");
            return Err(status(Code::FAILED_PRECONDITION, text));
        }
        let started = exec.start(&task.container, &self.namespace, &self.events).await;
        started.map_err(failed)?;
        Ok(StartResponse { pid: exec.process.pid(), ..StartResponse::default() })
    }

    pub(super) async fn delete_task(self: Arc<Self>, id: String) -> Result<DeleteResponse> {
        // containerd may have given up a creation that is under way.
        if self.tasks.abandon(&id).await {
            return Err(no_such(&id, ""));
        }
        let task = self.task(&id)?;
        if matches!(task.init.status(), Status::Running | Status::Paused) {
            let text = format!("task {id} runs: kill it first");
            return Err(status(Code::FAILED_PRECONDITION, text));
        }
        let exited = self.tasks.delete(&task, &self.events).await.map_err(failed)?;
        if self.tasks.is_empty() {
            // The answer comes first. A shutdown that came while tasks were left is not repeated.
            let asked = self.shutdown_asked.load(Ordering::Relaxed);
            let shim = Arc::clone(&self);
            tokio::spawn(async move {
                sleep(if asked { ANSWER_TIME } else { IDLE_TIME }).await;
                if shim.tasks.is_idle() {
                    shim.shutdown.notify_one();
                }
            });
        }
        Ok(deleted(&task.init, exited))
    }

    pub(super) async fn delete_exec(&self, id: &str, exec_id: &str) -> Result<DeleteResponse> {
        let (task, exec) = (self.task(id)?, self.exec(id, exec_id)?);
        let process = &exec.process;
        // After a start that is under way.
        let order = process.order.lock().await;
        let exited = match process.status() {
            Status::Stopped(exited) => exited,
            Status::Created => Exited { status: 0, at: std::time::SystemTime::now() },
            Status::Running | Status::Paused => {
                let text = format!("process {exec_id} of task {id} runs: kill it first");
                return Err(status(Code::FAILED_PRECONDITION, text));
            }
        };
        // Nobody can start it any more.
        process.set_status(Status::Stopped(exited));
        drop(order);
        exec.give_up(OUTPUT_TIMEOUT).await;
        task.remove(exec_id);
        Ok(deleted(process, exited))
    }

    pub(super) async fn add_exec(&self, request: ExecProcessRequest) -> Result<Empty> {
        let task = self.task(&request.id)?;
        let process = parse_process(&request).map_err(failed)?;
        let spec = ExecSpec { process, cgroup: None, detached: false };
        let addresses = Addresses {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        let parked = task.pod.park(Arc::clone(&task.root)).await.map_err(failed)?;
        let process = Process::new(&request.id, &request.exec_id, addresses, parked);
        if !task.add(Arc::new(Exec::new(process, spec))) {
            let text = format!("task {} has a process {} already", request.id, request.exec_id);
            return Err(status(Code::ALREADY_EXISTS, text));
        }
        let event = TaskExecAdded {
            container_id: request.id,
            exec_id: request.exec_id,
            ..TaskExecAdded::default()
        };
        self.events.send(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &event);
        Ok(Empty::default())
    }

    pub(super) async fn kill(&self, request: KillRequest) -> Result<Empty> {
        let KillRequest { id, exec_id, signal, all, .. } = request;
        let task = self.task(&id)?;
        let (killed, ended) = if exec_id.is_empty() {
            if task.init.exited().is_some() {
                return Err(finished());
            }
            // Its end may be known, and not told yet.
            let killed = sent(signal, task.container.ask(Request::Kill { signal, all })).await;
            let ended = killed.is_err() && timeout(END_TIME, task.container.exit()).await.is_ok();
            (killed, ended)
        } else {
            let exec = self.exec(&id, &exec_id)?;
            let killed = exec.kill(signal).await;
            let ended = killed.is_err()
                && exec.process.status() != Status::Created
                && timeout(END_TIME, exec.process.wait()).await.is_ok();
            (killed, ended)
        };
        match killed {
            Ok(()) => Ok(Empty::default()),
            Err(_) if ended => Err(finished()),
            Err(error) if error.kind == ErrorKind::Ended => Err(finished()),
            Err(error) => Err(failed(error)),
        }
    }

    pub(super) async fn pause(&self, id: &str) -> Result<Empty> {
        let task = self.task(id)?;
        task.check(Status::Running, "pause")?;
        task.container.ask(Request::Pause).await.map_err(failed)?;
        task.init.set_status(Status::Paused);
        let event = TaskPaused { container_id: id.to_owned(), ..TaskPaused::default() };
        self.events.send(topics::TASK_PAUSED_EVENT_TOPIC, &event);
        Ok(Empty::default())
    }

    pub(super) async fn resume(&self, id: &str) -> Result<Empty> {
        let task = self.task(id)?;
        task.check(Status::Paused, "resume")?;
        task.container.ask(Request::Resume).await.map_err(failed)?;
        task.init.set_status(Status::Running);
        let event = TaskResumed { container_id: id.to_owned(), ..TaskResumed::default() };
        self.events.send(topics::TASK_RESUMED_EVENT_TOPIC, &event);
        Ok(Empty::default())
    }

    pub(super) async fn resize(&self, request: ResizePtyRequest) -> Result<Empty> {
        let side = |length: u32| u16::try_from(length).unwrap_or(u16::MAX);
        let size = Size { columns: side(request.width), rows: side(request.height) };
        let resized = match request.exec_id.as_str() {
            "" => {
                let task = self.task(&request.id)?;
                within(ANSWER_TIMEOUT, task.container.ask(Request::Resize { size })).await
            }
            exec_id => self.exec(&request.id, exec_id)?.resize(size).await,
        };
        resized.map(|()| Empty::default()).map_err(failed)
    }

    pub(super) async fn pids(&self, id: &str) -> Result<PidsResponse> {
        let task = self.task(id)?;
        // Up to the deletion, also of a task that has ended: a containerd that has been restarted
        // forgets a task without processes, and its exit status.
        let init = ProcessInfo { pid: task.init.pid(), ..ProcessInfo::default() };
        let mut processes = vec![init];
        for exec in task.all_execs() {
            if exec.process.status() == Status::Running {
                let details = ProcessDetails {
                    exec_id: exec.process.exec_id.clone(),
                    ..ProcessDetails::default()
                };
                let info = Some(any(RUNC, &details)).into();
                let pid = exec.process.pid();
                processes.push(ProcessInfo { pid, info, ..ProcessInfo::default() });
            }
        }
        // A guest that does not answer leaves the list as it is.
        match within(LOOK_TIMEOUT, task.container.processes()).await {
            Ok(all) => {
                let known = processes.len();
                let further = all.iter().skip(known).map(|process| ProcessInfo {
                    pid: process.pid.saturating_add(GUEST_PIDS),
                    ..ProcessInfo::default()
                });
                let further: Vec<_> = further.collect();
                processes.extend(further);
            }
            Err(error) => log::debug!("{error}"),
        }
        Ok(PidsResponse { processes, ..PidsResponse::default() })
    }

    pub(super) async fn stats(&self, id: &str) -> Result<StatsResponse> {
        let task = self.task(id)?;
        if task.init.exited().is_some() {
            // containerd leaves such a task out.
            return Err(no_such(id, ""));
        }
        let read = within(ANSWER_TIMEOUT, task.container.stats()).await.map_err(failed)?;
        Ok(StatsResponse {
            stats: Some(any(CGROUPS, &metrics(&read))).into(),
            ..StatsResponse::default()
        })
    }

    pub(super) async fn update(&self, request: UpdateTaskRequest) -> Result<Empty> {
        let task = self.task(&request.id)?;
        let resources = request.resources.into_option().unwrap_or_default();
        let resources =
            bundle::parse_resources("the resources", &resources.value).map_err(failed)?;
        let resources = Box::new(resources);
        task.container.ask(Request::Update { resources }).await.map_err(failed)?;
        Ok(Empty::default())
    }
}

fn parse_process(request: &ExecProcessRequest) -> crate::error::Result<oci_spec::runtime::Process> {
    let spec = request.spec.as_ref().ok_or_else(|| Error::new("the process is missing"))?;
    let mut process = bundle::parse_process("the process", &spec.value)?;
    process.set_terminal(Some(request.terminal));
    Ok(process)
}

fn deleted(process: &Process, exited: Exited) -> DeleteResponse {
    DeleteResponse {
        pid: process.pid(),
        exit_status: exited.status,
        exited_at: Some(timestamp(exited.at)).into(),
        ..DeleteResponse::default()
    }
}

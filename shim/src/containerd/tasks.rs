//! The tasks of a shim: their first processes, their execs, and the events about them.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{
    events::task::{TaskDelete, TaskOOM},
    topics,
    ttrpc::{self, Code},
};
use tokio::{sync::watch, task::JoinSet, time::timeout};

use crate::{
    cgroup::Cgroup,
    container_id::ContainerId,
    containerd::{
        events::Events,
        exec::Exec,
        messages::timestamp,
        pod::Pod,
        pod_thread::{Made, remove_empty_roots},
        process::{Exited, Process, Status, UNKNOWN_EXIT, tell_exit},
        status::status as refused,
        stdio::Kept,
    },
    engine::{Container, Record, Request, RuntimeNamespace, hooks},
    error::{Error, Result},
    event_loop::blocking,
    logger,
    state::StateDir,
};

/// Longest time for the rest of the output of a process that is deleted, as in runc's shim.
pub(super) const OUTPUT_TIMEOUT: Duration = Duration::from_secs(2);

/// Longest time for the ends of execs to be known, once their container has ended.
const EXECS_TIMEOUT: Duration = Duration::from_secs(2);

/// Longest time for a container to end that is deleted. The engine gives itself less.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// Name of the file in the bundle of a task that was killed at its memory limit, as conmon makes it.
const OOM_FILE: &str = "oom";

/// A task: a container of the pod, as containerd knows it.
pub(super) struct Task {
    pub(super) id: ContainerId,
    pub(super) bundle: String,
    pub(super) init: Arc<Process>,
    pub(super) container: Container,
    pub(super) dir: Arc<StateDir>,
    /// Namespaces that the hooks run in, if there are hooks.
    pub(super) origin: Option<RuntimeNamespace>,
    /// The root file system.
    pub(super) root: Arc<OwnedFd>,
    pub(super) pod: Arc<Pod>,
    execs: Mutex<HashMap<String, Arc<Exec>>>,
    /// Number of kills at the memory limit that have been told.
    ooms: Mutex<u64>,
    /// True once somebody deletes the task.
    deleting: tokio::sync::Mutex<()>,
}

/// All tasks of a shim, and the pod that they are in.
#[derive(Default)]
pub(super) struct Tasks {
    all: Mutex<HashMap<String, Arc<Task>>>,
    /// The pod once there is one. Held while it boots.
    pod: tokio::sync::Mutex<Option<Arc<Pod>>>,
    /// Tasks that are being made.
    creating: Mutex<HashMap<String, Arc<Progress>>>,
    /// True if the pod is that of a sandbox, which containerd ends.
    of_sandbox: AtomicBool,
    /// True once the shim is to end.
    closing: watch::Sender<bool>,
}

/// There is such a task already.
pub(super) struct Exists;

/// A task that is being made, until this is dropped.
pub(super) struct Creation<'t> {
    tasks: &'t Tasks,
    id: String,
    progress: Arc<Progress>,
}

/// The progress of a task that is being made.
#[derive(Default)]
struct Progress {
    abandoned: AtomicBool,
    done: watch::Sender<bool>,
}

impl Creation<'_> {
    /// Tells whether nobody wants the task any more. containerd has given its creation up, and does
    /// not know of it.
    pub(super) fn is_abandoned(&self) -> bool {
        self.progress.abandoned.load(Ordering::Relaxed)
    }
}

impl Drop for Creation<'_> {
    fn drop(&mut self) {
        self.tasks.creating().remove(&self.id);
        self.progress.done.send_replace(true);
    }
}

impl Task {
    pub(super) fn new(
        id: ContainerId,
        bundle: String,
        init: Process,
        made: Made,
        pod: Arc<Pod>,
    ) -> Self {
        let Made { container, dir, origin, root, .. } = made;
        Self {
            id,
            bundle,
            init: Arc::new(init),
            container,
            dir,
            origin,
            root,
            pod,
            execs: Mutex::default(),
            ooms: Mutex::default(),
            deleting: tokio::sync::Mutex::default(),
        }
    }

    /// Starts to watch the container. Its end and its kills at the memory limit become events.
    pub(super) fn watch(self: &Arc<Self>, events: &Events) {
        let (task, sent) = (Arc::clone(self), events.clone());
        tokio::spawn(async move {
            logger::about(task.id.as_str(), task.watch_ooms(&sent)).await;
        });
        let (task, sent) = (Arc::clone(self), events.clone());
        tokio::spawn(async move {
            logger::about(task.id.as_str(), task.watch_exit(&sent)).await;
        });
    }

    async fn watch_ooms(&self, events: &Events) {
        // No container has so many kills, so the first answer comes at once.
        let mut seen = u64::MAX;
        loop {
            match self.container.wait_oom(seen).await {
                // The container has ended before anybody could count.
                Ok((u64::MAX, _)) => return,
                Ok((count, ended)) => {
                    self.tell_ooms(count, events);
                    if ended {
                        return;
                    }
                    seen = count;
                }
                Err(error) => return log::debug!("{error}"),
            }
        }
    }

    /// Tells of kills that have not been told yet.
    fn tell_ooms(&self, count: u64, events: &Events) {
        // Whoever panicked has left it whole: each change is one assignment.
        let mut told = self.ooms.lock().unwrap_or_else(PoisonError::into_inner);
        if count > *told {
            *told = count;
            let event = TaskOOM { container_id: self.id.to_string(), ..TaskOOM::default() };
            events.send(topics::TASK_OOM_EVENT_TOPIC, &event);
        }
    }

    /// Makes the file in the bundle by which CRI-O, which takes no events, tells such a kill.
    fn note_oom(&self) {
        let file = Path::new(&self.bundle).join(OOM_FILE);
        if let Err(error) = std::fs::write(&file, "") {
            log::warn!("cannot write {}: {error}", file.display());
        }
    }

    async fn watch_exit(&self, events: &Events) {
        let exit = self.container.exit().await;
        let at = SystemTime::now();
        let status = match exit {
            Some(exit) => exit.status.into(),
            None => {
                let ended = self.container.ended().await;
                if let Some(error) = &ended.error {
                    log::error!("container {}: {error}", self.id);
                }
                ended.exit_code().into()
            }
        };
        // The kill comes before the exit that it caused: so containerd tells the reason.
        if exit.is_some_and(|exit| exit.oom_killed) {
            self.tell_ooms(1, events);
            if events.are_unheard() {
                self.note_oom();
            }
        }
        // All that the container ran has ended with it, and the first process is told last.
        let execs = self.all_execs();
        execs.iter().for_each(|exec| exec.container_has_ended());
        let all = async {
            for exec in &execs {
                exec.process.wait().await;
            }
        };
        let _ = timeout(EXECS_TIMEOUT, all).await;
        let init = &self.init;
        let _order = init.order.lock().await;
        init.set_status(Status::Stopped(Exited { status, at }));
        tell_exit(init, Exited { status, at }, events);
    }

    /// Refuses an action on a task whose first process has another status.
    pub(super) fn check(&self, status: Status, verb: &str) -> ttrpc::Result<()> {
        if self.init.status() == status {
            return Ok(());
        }
        let text = format!("cannot {verb} task {}: it is {}", self.id, self.init.status());
        Err(refused(Code::FAILED_PRECONDITION, text))
    }

    /// The exec of this id.
    pub(super) fn exec(&self, exec_id: &str) -> Option<Arc<Exec>> {
        self.execs().get(exec_id).cloned()
    }

    /// All execs.
    pub(super) fn all_execs(&self) -> Vec<Arc<Exec>> {
        self.execs().values().cloned().collect()
    }

    /// Adds an exec. False if there is one of its id.
    pub(super) fn add(&self, exec: Arc<Exec>) -> bool {
        let id = exec.process.exec_id.clone();
        let mut execs = self.execs();
        let new = !execs.contains_key(&id);
        if new {
            execs.insert(id, exec);
        }
        new
    }

    /// Forgets an exec.
    pub(super) fn remove(&self, exec_id: &str) {
        self.execs().remove(exec_id);
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Exec>>> {
        // Whoever panicked has left the table whole: each change is one call.
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the container if it has not ended, and removes everything of it but the pod.
    async fn end(&self) -> Result<()> {
        if timeout(OUTPUT_TIMEOUT, self.container.ended()).await.is_err() {
            // Nobody reads: the reader that the shim keeps must not hold the output up.
            self.init.keep(Kept::default());
            // It may be ending already.
            let _ = self.container.ask(Request::Destroy).await;
            if timeout(END_TIMEOUT, self.container.ended()).await.is_err() {
                return Err(Error::new(format!("container {} does not end", self.id)));
            }
        }
        Ok(())
    }
}

/// Removes a container's cgroup. Returns its record, if there still is one.
pub(super) async fn remove_cgroup(dir: &StateDir) -> Result<Option<Record>> {
    let record = Record::read(dir)?;
    if let Some(cgroup) = record.as_ref().and_then(|record| record.cgroup.clone()) {
        blocking(move || Cgroup::remove(&cgroup)).await?;
    }
    Ok(record)
}

/// Removes a container's cgroup and state, and runs its poststop hooks.
pub(super) async fn remove_state(dir: &StateDir, origin: Option<&RuntimeNamespace>) -> Result<()> {
    let Some(record) = remove_cgroup(dir).await? else { return Ok(()) };
    if dir.remove()? {
        hooks::run_poststop(&record, origin).await;
    }
    // Others may have made them.
    if let Some(root) = dir.path().parent() {
        remove_empty_roots(root);
    }
    Ok(())
}

impl Tasks {
    /// The task of this id.
    pub(super) fn get(&self, id: &str) -> Option<Arc<Task>> {
        self.all().get(id).cloned()
    }

    /// Adds a task.
    pub(super) fn add(&self, task: Arc<Task>) {
        self.all().insert(task.id.to_string(), task);
    }

    /// Tells whether there is no task, none is being made, and the shim has no sandbox.
    pub(super) fn is_idle(&self) -> bool {
        let of_sandbox = self.of_sandbox.load(Ordering::Relaxed);
        !of_sandbox && self.is_empty() && self.creating().is_empty()
    }

    /// Has the pod stay without tasks: it is that of a sandbox.
    pub(super) fn are_of_a_sandbox(&self) {
        self.of_sandbox.store(true, Ordering::Relaxed);
    }

    /// Tells whether there is no task.
    pub(super) fn is_empty(&self) -> bool {
        self.all().is_empty()
    }

    /// The pids that stand for the first processes of the tasks.
    pub(super) fn pids(&self) -> HashMap<i32, ContainerId> {
        let pid = |task: &Arc<Task>| i32::try_from(task.init.pid()).ok();
        self.all().values().filter_map(|task| Some((pid(task)?, task.id.clone()))).collect()
    }

    /// The pod's place. Locked while the pod boots.
    pub(super) fn pod(&self) -> &tokio::sync::Mutex<Option<Arc<Pod>>> {
        &self.pod
    }

    /// Deletes a task whose first process has ended or was never started. Once the last task is
    /// deleted, the microVM is gone, unless a sandbox has it.
    ///
    /// # Errors
    ///
    /// If something of the task cannot be removed. The task stays then.
    pub(super) async fn delete(&self, task: &Arc<Task>, events: &Events) -> Result<Exited> {
        let _deleting = task.deleting.lock().await;
        task.end().await?;
        let unknown = Exited { status: UNKNOWN_EXIT, at: SystemTime::now() };
        // The end of the container is the end of its first process.
        let exited = timeout(END_TIMEOUT, task.init.wait()).await.unwrap_or(unknown);
        // Somebody else may have deleted it meanwhile, and another task may have its id.
        if self.get(task.id.as_str()).is_none_or(|known| !Arc::ptr_eq(&known, task)) {
            return Ok(exited);
        }
        let mut execs = JoinSet::new();
        for exec in task.all_execs() {
            execs.spawn(logger::inherit(async move { exec.give_up(Duration::ZERO).await }));
        }
        execs.join_all().await;
        remove_state(&task.dir, task.origin.as_ref()).await?;
        let last = {
            let mut all = self.all();
            all.remove(task.id.as_str());
            all.is_empty()
        };
        if last && !self.of_sandbox.load(Ordering::Relaxed) {
            let mut place = self.pod.lock().await;
            // A creation may have come in between.
            if self.is_empty()
                && let Some(pod) = place.take()
            {
                pod.close().await;
            }
        }
        let event = TaskDelete {
            container_id: task.id.to_string(),
            pid: task.init.pid(),
            exit_status: exited.status,
            exited_at: Some(timestamp(exited.at)).into(),
            ..TaskDelete::default()
        };
        events.send(topics::TASK_DELETE_EVENT_TOPIC, &event);
        Ok(exited)
    }

    /// Ends the pod, with all tasks, and makes a boot that is under way fail. The state of the tasks
    /// stays, with their exit statuses, for the action `delete`.
    pub(super) async fn close(&self) {
        self.give_up_boot();
        let pod = self.pod.lock().await.take();
        if let Some(pod) = pod {
            pod.close().await;
        }
        let all: Vec<Arc<Task>> = self.all().values().cloned().collect();
        // So their exits are told.
        let ends = async {
            for task in &all {
                task.init.wait().await;
            }
        };
        let _ = timeout(EXECS_TIMEOUT, ends).await;
    }

    /// Makes a boot that is under way fail, and every later one.
    pub(super) fn give_up_boot(&self) {
        self.closing.send_replace(true);
    }

    /// Waits until the shim is to end.
    pub(super) fn closing(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut closing = self.closing.subscribe();
        async move { drop(closing.wait_for(|closing| *closing).await) }
    }

    /// Notes that a task is being made.
    ///
    /// # Errors
    ///
    /// If there is a task of this id, or one is being made.
    pub(super) fn begin(&self, id: &str) -> Result<Creation<'_>, Exists> {
        if self.get(id).is_some() {
            return Err(Exists);
        }
        let mut creating = self.creating();
        if creating.contains_key(id) {
            return Err(Exists);
        }
        let progress = Arc::new(Progress::default());
        creating.insert(id.to_owned(), Arc::clone(&progress));
        Ok(Creation { tasks: self, id: id.to_owned(), progress })
    }

    /// If a task is being made, has it taken down again once it is there, and waits until it is.
    /// False if there is none.
    pub(super) async fn abandon(&self, id: &str) -> bool {
        let Some(progress) = self.creating().get(id).cloned() else { return false };
        progress.abandoned.store(true, Ordering::Relaxed);
        // The sender is there as long as this.
        let _ = progress.done.subscribe().wait_for(|done| *done).await;
        true
    }

    fn creating(&self) -> MutexGuard<'_, HashMap<String, Arc<Progress>>> {
        self.creating.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn all(&self) -> MutexGuard<'_, HashMap<String, Arc<Task>>> {
        // Whoever panicked has left the table whole: each change is one call.
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

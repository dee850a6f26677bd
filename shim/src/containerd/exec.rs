//! A further process of a task: added by `Exec`, run by `Start`, removed by `Delete`.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use containerd_shim_protos::{events::task::TaskExecStarted, topics};
use tokio::{
    sync::{Notify, watch},
    time::timeout,
};

use crate::{
    containerd::{
        events::Events,
        process::{Exited, Process, Status, UNKNOWN_EXIT, tell_exit},
        stdio::{Kept, Of},
    },
    engine::{self, Container, ExecControl, ExecSpec},
    error::{Error, ErrorKind, Result},
    event_loop::blocking,
    logger,
    signals::KILL,
    terminal::Size,
    text::seconds,
};

/// Longest time for the end of a process that nobody wants. The engine gives itself less.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest time for the guest to pass a signal on or to resize a terminal.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest time for a process to die of SIGKILL.
const KILL_TIMEOUT: Duration = Duration::from_secs(6);

/// A further process of a task.
pub(super) struct Exec {
    pub(super) process: Process,
    spec: ExecSpec,
    /// The size that the terminal is to begin with.
    size: Mutex<Option<Size>>,
    running: Mutex<Option<Running>>,
    /// Notified when nobody wants the process any more.
    unwanted: Notify,
    /// Notified when the process is killed while it is being started.
    aborted: Notify,
}

/// A process that has been started.
#[derive(Clone)]
struct Running {
    control: ExecControl,
    /// True once the streams are closed and the guest has forgotten the process.
    gone: watch::Receiver<bool>,
}

impl Exec {
    pub(super) fn new(process: Process, spec: ExecSpec) -> Self {
        Self {
            process,
            spec,
            size: Mutex::default(),
            running: Mutex::default(),
            unwanted: Notify::new(),
            aborted: Notify::new(),
        }
    }

    /// Starts the process. Dropping the future kills it.
    ///
    /// # Errors
    ///
    /// If it was started before, or cannot be started.
    pub(super) async fn start(
        self: &Arc<Self>,
        container: &Container,
        namespace: &str,
        events: &Events,
    ) -> Result<()> {
        let _order = self.process.order.lock().await;
        if self.process.status() != Status::Created {
            let id = &self.process.exec_id;
            return Err(Error::new(format!("process {id} has been started before")));
        }
        let size = *self.size();
        let (addresses, id) = (self.process.addresses.clone(), self.process.id.clone());
        let namespace = namespace.to_owned();
        let opened =
            blocking(move || addresses.open(Of { id: &id, namespace: &namespace }, size)).await;
        let started = match opened {
            Ok((io, kept)) => {
                self.process.keep(kept);
                tokio::select! {
                    started = container.exec(self.spec.clone(), io) => started,
                    // The dropped start kills the process.
                    () = self.aborted.notified() => {
                        Err(Error::new(format!("process {} was killed", self.process.exec_id)))
                    }
                }
            }
            Err(error) => Err(error),
        };
        let exec = match started {
            Ok(exec) => exec,
            Err(error) => {
                let exited = Exited { status: UNKNOWN_EXIT, at: SystemTime::now() };
                self.process.set_status(Status::Stopped(exited));
                return Err(error);
            }
        };
        let (tell_gone, gone) = watch::channel(false);
        *self.running() = Some(Running { control: exec.control(), gone });
        self.process.set_status(Status::Running);
        let event = TaskExecStarted {
            container_id: self.process.id.clone(),
            exec_id: self.process.exec_id.clone(),
            pid: self.process.pid(),
            ..TaskExecStarted::default()
        };
        events.send(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &event);
        let (this, events) = (Arc::clone(self), events.clone());
        tokio::spawn(logger::inherit(async move {
            this.attend(exec, &events).await;
            tell_gone.send_replace(true);
        }));
        Ok(())
    }

    /// Waits for the end of the process and of its output, as long as somebody wants it.
    async fn attend(&self, mut exec: engine::Exec, events: &Events) {
        let mut exit = exec.exit();
        let known = tokio::select! {
            known = exit.wait_for(Option::is_some) => known.ok().and_then(|exit| *exit),
            () = self.unwanted.notified() => None,
        };
        let exited = Exited {
            status: known.map_or(UNKNOWN_EXIT, |exit| exit.status.into()),
            at: SystemTime::now(),
        };
        {
            let _order = self.process.order.lock().await;
            self.process.set_status(Status::Stopped(exited));
            tell_exit(&self.process, exited, events);
        }
        if known.is_some() {
            // Other processes may have its outputs too.
            tokio::select! {
                _ = exec.wait() => {}
                () = self.unwanted.notified() => {}
            }
        }
    }

    /// Lets the rest of the output go, after `patience` at most, and kills the process if it has
    /// not ended. Its exit status is unknown then.
    pub(super) async fn give_up(&self, patience: Duration) {
        let Some(Running { mut gone, .. }) = self.running().clone() else { return };
        if timeout(patience, gone.wait_for(|gone| *gone)).await.is_ok() {
            return;
        }
        // Nobody reads: the reader that the shim keeps must not hold the output up.
        self.process.keep(Kept::default());
        self.unwanted.notify_one();
        if timeout(END_TIMEOUT, gone.wait_for(|gone| *gone)).await.is_err() {
            log::warn!("process {} of {} is still there", self.process.exec_id, self.process.id);
        }
    }

    /// Notes that the container has ended.
    pub(super) fn container_has_ended(&self) {
        if self.process.status() == Status::Created {
            let exited = Exited { status: UNKNOWN_EXIT, at: SystemTime::now() };
            self.process.set_status(Status::Stopped(exited));
        }
    }

    /// Sends a signal to the process.
    ///
    /// # Errors
    ///
    /// Of the kind [`ErrorKind::Ended`] if the process has ended. Of another kind if it was not
    /// started, or the guest refuses.
    pub(super) async fn kill(self: &Arc<Self>, signal: u32) -> Result<()> {
        if self.process.order.try_lock().is_err() && signal == KILL {
            self.aborted.notify_one();
        }
        // A process that is being started is killed then.
        drop(self.process.order.lock().await);
        let id = &self.process.exec_id;
        if self.process.exited().is_some() {
            return Err(Error::with_kind(ErrorKind::Ended, format!("process {id} has ended")));
        }
        let Some(control) = self.control() else {
            return Err(Error::new(format!("process {id} was not started")));
        };
        if signal == KILL {
            // Only a guest that does not answer takes longer. The process is given up then.
            let this = Arc::clone(self);
            tokio::spawn(async move {
                if timeout(KILL_TIMEOUT, this.process.wait()).await.is_err() {
                    this.give_up(Duration::ZERO).await;
                }
            });
        }
        sent(signal, control.kill(signal)).await
    }

    /// Gives the terminal a new size, which may be its first.
    ///
    /// # Errors
    ///
    /// If the process has ended, or has no terminal.
    pub(super) async fn resize(&self, size: Size) -> Result<()> {
        *self.size() = Some(size);
        match self.control() {
            Some(control) => within(ANSWER_TIMEOUT, control.resize(size)).await,
            None => Ok(()),
        }
    }

    fn control(&self) -> Option<ExecControl> {
        self.running().as_ref().map(|running| running.control.clone())
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        // Whoever panicked has left it whole: each change is one assignment.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn size(&self) -> MutexGuard<'_, Option<Size>> {
        self.size.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for a signal to be sent, a short time at most. A guest that does not run gets the signal
/// when it runs again, as a stopped process does. So the caller goes on to SIGKILL, and a process that
/// outlives it is given up.
pub(super) async fn sent(signal: u32, call: impl Future<Output = Result<()>>) -> Result<()> {
    timeout(ANSWER_TIMEOUT, call).await.unwrap_or_else(|_| {
        let limit = seconds(ANSWER_TIMEOUT);
        log::warn!("the guest does not answer within {limit}: signal {signal} waits there");
        Ok(())
    })
}

/// Runs a call to the guest within a limit.
///
/// # Errors
///
/// Those of the call, and if the guest does not answer in time.
pub(super) async fn within<T>(limit: Duration, call: impl Future<Output = Result<T>>) -> Result<T> {
    timeout(limit, call).await.unwrap_or_else(|_| {
        Err(Error::new(format!("the guest does not answer within {}", seconds(limit))))
    })
}

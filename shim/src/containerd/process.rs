//! A process as containerd knows it: the first of a task, or one of its execs.

use std::{
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use containerd_shim_protos::{
    api::{self, StateResponse},
    events::task::TaskExit,
    topics,
};
use tokio::sync::watch;

use crate::containerd::{
    events::Events,
    messages::timestamp,
    parked::Parked,
    stdio::{Addresses, Kept},
};

/// The exit status of a process whose own is unknown.
pub(super) const UNKNOWN_EXIT: u32 = 255;

/// The status of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Created,
    Running,
    Paused,
    Stopped(Exited),
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped(_) => "stopped",
        })
    }
}

/// The end of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Exited {
    /// Exit status, 0 to 255.
    pub(super) status: u32,
    pub(super) at: SystemTime,
}

/// A process, beside what runs it.
#[derive(Debug)]
pub(super) struct Process {
    /// Id of the task.
    pub(super) id: String,
    /// Id of the exec; empty for the first process.
    pub(super) exec_id: String,
    pub(super) addresses: Addresses,
    parked: Parked,
    status: watch::Sender<Status>,
    kept: Mutex<Kept>,
    /// Held while an event about the process is on its way, so that the start comes before the exit.
    pub(super) order: tokio::sync::Mutex<()>,
}

impl Process {
    pub(super) fn new(id: &str, exec_id: &str, addresses: Addresses, parked: Parked) -> Self {
        Self {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            addresses,
            parked,
            status: watch::Sender::new(Status::Created),
            kept: Mutex::default(),
            order: tokio::sync::Mutex::default(),
        }
    }

    /// The pid of the host that stands for the process.
    pub(super) fn pid(&self) -> u32 {
        self.parked.pid().unsigned_abs()
    }

    pub(super) fn status(&self) -> Status {
        *self.status.borrow()
    }

    /// The end of the process, if it has ended.
    pub(super) fn exited(&self) -> Option<Exited> {
        match self.status() {
            Status::Stopped(exited) => Some(exited),
            Status::Created | Status::Running | Status::Paused => None,
        }
    }

    /// Sets the status of a process that has not ended.
    pub(super) fn set_status(&self, status: Status) {
        self.status.send_if_modified(|now| {
            let changes = !matches!(now, Status::Stopped(_)) && *now != status;
            if changes {
                *now = status;
            }
            changes
        });
    }

    /// Waits for the end of the process.
    pub(super) async fn wait(&self) -> Exited {
        let mut status = self.status.subscribe();
        // The sender is there as long as this.
        let _ = status.wait_for(|status| matches!(status, Status::Stopped(_))).await;
        self.exited().unwrap_or(Exited { status: UNKNOWN_EXIT, at: SystemTime::now() })
    }

    /// Keeps what belongs to the streams.
    pub(super) fn keep(&self, kept: Kept) {
        *self.kept() = kept;
    }

    /// Lets the input end.
    pub(super) fn close_input(&self) {
        self.kept().close_input();
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Whoever panicked has left it whole: each change is one assignment.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state as containerd asks for it.
    pub(super) fn state(&self, bundle: &str) -> StateResponse {
        let (status, exited) = match self.status() {
            Status::Created => (api::Status::CREATED, None),
            Status::Running => (api::Status::RUNNING, None),
            Status::Paused => (api::Status::PAUSED, None),
            Status::Stopped(exited) => (api::Status::STOPPED, Some(exited)),
        };
        StateResponse {
            id: self.id.clone(),
            bundle: bundle.to_owned(),
            pid: self.pid(),
            status: status.into(),
            stdin: self.addresses.stdin.clone(),
            stdout: self.addresses.stdout.clone(),
            stderr: self.addresses.stderr.clone(),
            terminal: self.addresses.terminal,
            exit_status: exited.map_or(0, |exited| exited.status),
            exited_at: exited.map(|exited| timestamp(exited.at)).into(),
            exec_id: self.exec_id.clone(),
            ..StateResponse::default()
        }
    }
}

/// Tells containerd of the end of a process.
pub(super) fn tell_exit(process: &Process, exited: Exited, events: &Events) {
    let event = TaskExit {
        container_id: process.id.clone(),
        // The id of a task's first process is that of the task.
        id: match process.exec_id.as_str() {
            "" => process.id.clone(),
            exec_id => exec_id.to_owned(),
        },
        pid: process.pid(),
        exit_status: exited.status,
        exited_at: Some(timestamp(exited.at)).into(),
        ..TaskExit::default()
    };
    events.send(topics::TASK_EXIT_EVENT_TOPIC, &event);
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::OwnedFd, sync::Arc};

    use super::*;

    #[test]
    fn what_has_ended_stays_so() {
        let root = Arc::new(OwnedFd::from(File::open("/").unwrap()));
        let parked = Parked::new(root).unwrap();
        let process = Process::new("web", "one", Addresses::default(), parked);
        assert_eq!(process.state("/b").status, api::Status::CREATED.into());
        process.set_status(Status::Running);
        assert_eq!(process.exited(), None);
        let exited = Exited { status: 7, at: SystemTime::UNIX_EPOCH };
        process.set_status(Status::Stopped(exited));
        process.set_status(Status::Running);
        assert_eq!(process.exited(), Some(exited));
        let state = process.state("/b");
        assert_eq!((state.id.as_str(), state.exec_id.as_str()), ("web", "one"));
        assert_eq!((state.status, state.exit_status), (api::Status::STOPPED.into(), 7));
    }
}

//! The relay of an exec: it stands for a process in the guest with its pid and its exit status. The
//! sandbox process has the process and its streams.

use std::{
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use crate::{
    container_id::ContainerId,
    control::{
        Message, Verb,
        attend::Attendance,
        message,
        spawn::{Descriptors, Given, read_document},
    },
    engine::{
        ExecSpec, Io, Record,
        stdio::{Release, release},
    },
    error::{EXIT_EXEC_FAILED, Error, ErrorKind, Explain, Result},
    event_loop::event_loop,
    oom_score,
    preserved::Preserved,
    signals::Signals,
    state::{Exit, StateDir, versions},
    terminal::{self, Terminal},
    text::seconds,
};

/// Longest time for the start of the process. The guest has less: after that the sandbox process is
/// stopped, or has no descriptor left for the connection.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(75);

/// A process to run in a container. All paths are absolute.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ExecRelay {
    /// Id of the container.
    pub(super) id: ContainerId,
    /// State directory of the container.
    pub(super) state_dir: PathBuf,
    /// The process.
    pub(super) spec: ExecSpec,
    /// Host side of the process's terminal, if it has one.
    pub(super) terminal: Option<Terminal>,
    /// Descriptors of the caller that the process gets, from descriptor 3 on.
    pub(super) preserved: Vec<Preserved>,
}

/// `main` of the exec relay. Returns its exit status: the process's.
///
/// # Errors
///
/// If the relay cannot even begin. The end of the connection tells the launching process.
pub(super) fn main(descriptors: Descriptors) -> Result<u8> {
    let Given { socket, state } = descriptors.take()?;
    let exec: ExecRelay = read_document(&socket)?;
    drop(state);
    let adjusted = oom_score::adjust(exec.spec.process.oom_score_adj());
    let told = |message: &Message| message::send(&mut &socket, message).is_ok();
    let (mut started, mut given_up) = (false, false);
    let result = adjusted.and_then(|()| {
        exec.run(|| {
            started = true;
            let go = || message::read_line(&mut std::io::BufReader::new(&socket)).ok().flatten();
            match told(&Message::Created).then(go).flatten() {
                Some(_) => Ok(()),
                None => {
                    given_up = true;
                    Err(Error::new("the command that started the process has given it up"))
                }
            }
        })
    });
    match result {
        Ok(exit) => Ok(exit.status),
        Err(error) => {
            // The command that gave the process up has said why.
            if given_up {
                log::debug!("{error}");
            } else if started || !told(&Message::Failed(error.clone())) {
                log::error!("{error}");
            }
            Ok(EXIT_EXEC_FAILED)
        }
    }
}

/// Waits until the exec relay has started its process. Returns the relay's error if it could not.
pub(super) fn wait_started(socket: &UnixStream) -> Result<()> {
    let what = || "cannot hear from the exec relay".to_owned();
    match message::read_line(&mut std::io::BufReader::new(socket)).explain(what)? {
        None => Err(Error::new("the exec relay ended before the process was started")),
        Some(line) => match serde_json::from_slice(&line).explain(what)? {
            Message::Failed(error) => Err(error),
            _ => Ok(()),
        },
    }
}

/// Lets the exec relay go on. Until then the relay ends the process when the connection closes.
pub(super) fn let_go(socket: &mut UnixStream) -> Result<()> {
    message::send(socket, &Message::Done).explain(|| "cannot talk to the exec relay".into())
}

impl ExecRelay {
    /// Runs the process to its end in the foreground of this process. Calls `started` once the
    /// process runs. If `started` fails, the process is killed.
    ///
    /// # Errors
    ///
    /// If the process cannot be started, or its exit status is unknown.
    pub(super) fn run(&self, started: impl FnOnce() -> Result<()>) -> Result<Exit> {
        event_loop()?.block_on(self.run_process(started))
    }

    async fn run_process(&self, started: impl FnOnce() -> Result<()>) -> Result<Exit> {
        let dir = StateDir::open_path(&self.state_dir)?;
        versions::check(&dir)?;
        let mut signals = Signals::new()?;
        // If this is dropped, the sandbox process kills what has been started.
        let mut attendance = Attendance::connect(&dir, &self.id).await.map_err(|error| {
            log::debug!("{error}");
            self.not_running()
        })?;
        let (mut io, mut console) = Io::open(self.terminal.as_ref(), None, &self.preserved)?;
        if matches!(self.terminal, Some(Terminal::Inherited { .. })) {
            // The caller is this process, which hears of the changes of the size itself.
            console = terminal::of_this_process();
        } else {
            release(if self.spec.detached { Release::All } else { Release::but_for_messages() })?;
        }
        if !self.spec.detached {
            io.keep_terminal()?;
        }
        let (io, streams) = io.into_parts();
        let descriptors: Vec<BorrowedFd<'_>> = streams.iter().map(AsFd::as_fd).collect();
        let verb = Verb::Exec { spec: Box::new(self.spec.clone()), io };
        let begun = tokio::select! {
            begun = timeout(BEGIN_TIMEOUT, attendance.begin(verb, &descriptors)) => {
                begun.unwrap_or_else(|_| Err(Error::new(format!(
                    "the sandbox process of container {} does not answer within {}",
                    self.id, seconds(BEGIN_TIMEOUT)
                ))))?
            }
            number = signals.next_ending() => {
                return Err(Error::new(format!("interrupted by signal {number}")));
            }
        };
        // With copies left here, the other ends would not see the process close its streams.
        drop(descriptors);
        drop(streams);
        begun.ok_or_else(|| self.not_running())?;
        started()?;
        match attendance.attend(&mut signals, console.as_ref()).await? {
            Some(Message::Exited(exit)) => Ok(exit),
            Some(Message::Failed(error)) => Err(error),
            Some(_) => Err(Error::new("the sandbox process said something unexpected")),
            // It may have written the record and then have been killed.
            None => match Record::read(&dir).ok().flatten().and_then(|record| record.exit) {
                Some(_) => Ok(Exit::KILLED),
                None => Err(Error::with_kind(
                    ErrorKind::VmLost,
                    format!(
                        "the microVM of container {} is lost, and the exit status of the process \
                         is unknown: its sandbox process has ended",
                        self.id
                    ),
                )),
            },
        }
    }

    fn not_running(&self) -> Error {
        Error::new(format!(
            "cannot exec in container {}: container not running (its microVM is ending or gone)",
            self.id
        ))
    }
}

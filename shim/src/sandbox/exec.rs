//! A further process in a running container: started, relayed and waited for by a process of its
//! own, which talks straight to the agent.

use std::{
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    pin::pin,
    time::Duration,
};

use oci_spec::runtime::Process;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::{
    agent::Agent,
    console,
    control::{self, Message},
    launch::{Descriptors, Given, Terminal, read_document},
    lifecycle::START_TIMEOUT,
    random_u64,
    signals::{KILL, Signals, WINCH},
    stdio::Local,
};
use crate::{
    error::{Error, ErrorKind, Explain, Result},
    state::{Exit, Id, StateDir},
    terminal::{self, Size},
};

/// How long the sandbox process may take to write down how its container ended.
const END_TIMEOUT: Duration = Duration::from_secs(20);

/// What to run, and where. All paths are absolute.
#[derive(Debug, Serialize, Deserialize)]
pub struct Exec {
    /// The container.
    pub id: Id,
    /// Its state directory.
    pub state_dir: PathBuf,
    /// The process.
    pub process: Process,
    /// Where its terminal is, if it has one.
    pub terminal: Option<Terminal>,
}

/// `main` of the relay that a detached `exec` leaves behind. Returns its exit status: the process's.
///
/// # Errors
///
/// If it cannot even begin; the launching process is told by the end of the connection.
pub fn main(descriptors: Descriptors) -> Result<u8> {
    let Given { socket, state } = descriptors.take()?;
    let exec: Exec = read_document(&socket)?;
    drop(state);
    let told = |message: &Message| control::send(&mut &socket, message).is_ok();
    let mut started = false;
    let result = exec.run(|| {
        started = true;
        if told(&Message::Created) { Ok(()) } else { Err(Error::new("exec was given up")) }
    });
    match result {
        Ok(exit) => Ok(exit.status),
        Err(error) => {
            let code = error.exit_code();
            if started || !told(&Message::Failed { error: error.clone() }) {
                log::error!("{error}");
            }
            Ok(code)
        }
    }
}

/// Waits until the relay has started its process.
///
/// # Errors
///
/// If it could not.
pub fn wait_started(socket: &UnixStream) -> Result<()> {
    let what = || "cannot hear from the exec relay".to_owned();
    match control::read_line(&mut std::io::BufReader::new(socket)).explain(what)? {
        None => Err(Error::new("the exec relay ended before the process was started")),
        Some(line) => match serde_json::from_str(&line).explain(what)? {
            Message::Failed { error } => Err(error),
            _ => Ok(()),
        },
    }
}

impl Exec {
    /// Runs the process to its end in the foreground of this process. Calls `started` once it runs;
    /// if that fails, the process is killed.
    ///
    /// # Errors
    ///
    /// If the process cannot be started, or its exit status is unknown.
    pub fn run(&self, started: impl FnOnce() -> Result<()>) -> Result<Exit> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .explain(|| "cannot start the event loop".into())?;
        runtime.block_on(self.run_process(started))
    }

    async fn run_process(&self, started: impl FnOnce() -> Result<()>) -> Result<Exit> {
        let dir = StateDir::open_path(&self.state_dir)?;
        let mut signals = Signals::new()?;
        let (agent, mut relay, console) = tokio::select! {
            begun = timeout(START_TIMEOUT, self.begin(&dir)) => begun.unwrap_or_else(|_| {
                Err(Error::new("the process was not started in time by the guest"))
            })?,
            number = signals.next_ending() => {
                return Err(Error::new(format!("interrupted by signal {number}")));
            }
        };
        if let Err(error) = started() {
            agent.signal(KILL, false).await?;
            return Err(error);
        }
        let forward = |number| forward(agent.clone(), console.as_ref(), number);
        // The terminal's size may have been set while the process was started.
        forward(WINCH);
        let mut waiting = pin!(agent.wait());
        let exit = loop {
            tokio::select! {
                biased;
                exit = &mut waiting => break exit,
                number = signals.next() => forward(number),
            }
        };
        match exit {
            Ok(exit) => {
                relay.finished().await;
                Ok(exit)
            }
            Err(error) => {
                let exit = self.exit_with_container(&dir, error).await?;
                relay.finished().await;
                Ok(exit)
            }
        }
    }

    /// Has the agent start the process, with its standard streams connected.
    async fn begin(&self, dir: &StateDir) -> Result<(Agent, super::stdio::Relay, Option<OwnedFd>)> {
        let exec_id = format!("exec-{:016x}", random_u64()?);
        let agent = Agent::connect(dir, &self.id, exec_id).await.map_err(|error| {
            log::debug!("{error}");
            // The agent serves for as long as there is a container to exec in.
            Error::new(format!(
                "cannot exec in container {}: container not running (its microVM is ending or gone)",
                self.id
            ))
        })?;
        let (local, size, console) = match &self.terminal {
            None => (Local::inherited()?, None, None),
            Some(Terminal::Inherited { size }) => {
                let console = terminal::of_this_process()
                    .and_then(|terminal| terminal.try_clone_to_owned().ok());
                (Local::inherited_terminal()?, Some(*size), console)
            }
            Some(Terminal::Socket { path }) => {
                let console = console::make(path, None)?;
                (Local::terminal(console.as_fd())?, None, Some(console))
            }
        };
        let (tokens, streams) = local.connect(dir).await?;
        agent.exec_process(&self.process, tokens, size).await?;
        Ok((agent, streams.relay()?, console))
    }

    /// How the process ended when the connection to its agent broke. If its container ended as it
    /// should, all of the container's processes were killed with it; otherwise nobody knows.
    async fn exit_with_container(&self, dir: &StateDir, error: Error) -> Result<Exit> {
        let sandbox = dir.record()?.map(|record| record.sandbox);
        let ended = tokio::task::spawn_blocking(move || {
            sandbox.is_none_or(|sandbox| sandbox.wait(END_TIMEOUT))
        });
        // Cannot be waited for any other way, if this fails.
        let ended = ended.await.unwrap_or(false);
        let container_exit = dir.record()?.and_then(|record| record.exit);
        match container_exit.filter(|_| ended) {
            Some(_) => Ok(Exit { status: 128 + 9, oom_killed: false }),
            None => Err(Error::with_kind(
                ErrorKind::VmLost,
                format!(
                    "the microVM of container {} is lost, and the exit status of the process is \
                     unknown: {}",
                    self.id, error.message
                ),
            )),
        }
    }
}

/// Passes a signal, or a new size of the terminal, on to the process.
fn forward(agent: Agent, console: Option<&OwnedFd>, number: u32) {
    let size = console.and_then(terminal::size).filter(|size| *size != Size::default());
    tokio::spawn(async move {
        let forwarded = match (number, size) {
            (WINCH, None) => Ok(()),
            (WINCH, Some(size)) => agent.resize(size).await,
            (number, _) => agent.signal(number, false).await,
        };
        if let Err(error) = forwarded {
            log::debug!("{error}");
        }
    });
}

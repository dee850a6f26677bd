//! A further process in a running container. A process of its own starts it, relays its streams and
//! waits for it. This process talks straight to the agent.

use std::{os::unix::net::UnixStream, path::PathBuf, pin::pin, time::Duration};

use oci_spec::runtime::Process as ProcessSpec;
use serde::{Deserialize, Serialize};
use tokio::{task::JoinHandle, time::timeout};

use crate::{
    container_id::ContainerId,
    control::{
        Message, message,
        spawn::{Descriptors, Given, read_document},
        versions,
        wait::ContainerEnd,
    },
    engine::{
        guest_process::GuestProcess,
        lifecycle::START_TIMEOUT,
        record::Record,
        stdio::{self, Apart, Ends, Relay, Release},
    },
    error::{EXIT_EXEC_FAILED, Error, ErrorKind, Explain, Result},
    event_loop::event_loop,
    microvm::agent::Agent,
    oom_score,
    preserved::Preserved,
    random::random_u64,
    signals::{KILL, Signals, WINCH},
    state::{Exit, StateDir},
    terminal::{self, Terminal},
};

/// Longest time for the sandbox process to report the end of its container.
const END_TIMEOUT: Duration = Duration::from_secs(20);

/// Longest time for the guest to kill a process that nobody wants any more.
const PUT_DOWN_TIMEOUT: Duration = Duration::from_secs(5);

/// A process to run in a container. All paths are absolute.
#[derive(Debug, Serialize, Deserialize)]
pub struct Exec {
    /// Id of the container.
    pub id: ContainerId,
    /// State directory of the container.
    pub state_dir: PathBuf,
    /// The process.
    pub process: ProcessSpec,
    /// Path of the process's cgroup in the guest, below the container's own cgroup.
    pub cgroup: Option<String>,
    /// Host side of the process's terminal, if it has one.
    pub terminal: Option<Terminal>,
    /// Descriptors of the caller that the process gets, from descriptor 3 on.
    pub preserved: Vec<Preserved>,
    /// True if the command that starts the process does not stay until its end.
    pub detached: bool,
    /// Memory of the microVM in MiB.
    pub memory_mib: u64,
}

/// The relay of the process's streams.
enum Streaming {
    /// Relayed by threads of this process.
    Here(Relay),
    /// Relayed by a process of their own.
    Apart(Apart),
}

/// State of the call that starts the process.
enum Call {
    /// Not made, or it failed: there is no process.
    NotMade,
    /// Not answered yet. A task has the call, so that the answer is still heard when nobody waits
    /// for the process any more.
    Made(JoinHandle<Result<()>>),
    /// Answered: the process runs.
    Answered,
}

/// `main` of the exec relay. Returns its exit status: the process's.
///
/// # Errors
///
/// If the relay cannot even begin. The end of the connection tells the launching process.
pub fn main(descriptors: Descriptors) -> Result<u8> {
    let Given { socket, state } = descriptors.take()?;
    let exec: Exec = read_document(&socket)?;
    drop(state);
    let adjusted = oom_score::adjust(exec.process.oom_score_adj());
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
            } else if started || !told(&Message::Failed { error: error.clone() }) {
                log::error!("{error}");
            }
            Ok(EXIT_EXEC_FAILED)
        }
    }
}

/// Waits until the exec relay has started its process. Returns the relay's error if it could not.
pub fn wait_started(socket: &UnixStream) -> Result<()> {
    let what = || "cannot hear from the exec relay".to_owned();
    match message::read_line(&mut std::io::BufReader::new(socket)).explain(what)? {
        None => Err(Error::new("the exec relay ended before the process was started")),
        Some(line) => match serde_json::from_slice(&line).explain(what)? {
            Message::Failed { error } => Err(error),
            _ => Ok(()),
        },
    }
}

/// Lets the exec relay go on. Until then the relay ends the process when the connection closes.
pub fn let_go(socket: &mut UnixStream) -> Result<()> {
    message::send(socket, &Message::Done).explain(|| "cannot talk to the exec relay".into())
}

impl Exec {
    /// Runs the process to its end in the foreground of this process. Calls `started` once the
    /// process runs. If `started` fails, the process is killed.
    ///
    /// # Errors
    ///
    /// If the process cannot be started, or its exit status is unknown.
    pub fn run(&self, started: impl FnOnce() -> Result<()>) -> Result<Exit> {
        event_loop()?.block_on(self.run_process(started))
    }

    async fn run_process(&self, started: impl FnOnce() -> Result<()>) -> Result<Exit> {
        let dir = StateDir::open_path(&self.state_dir)?;
        versions::check(&dir)?;
        let mut signals = Signals::new()?;
        let (end, agent) = bounded(&mut signals, self.connect(&dir)).await?;
        let mut call = Call::NotMade;
        let begun = bounded(&mut signals, self.begin(&dir, &agent, &mut call)).await;
        let exit = match begun.and_then(|begun| started().map(|()| begun)) {
            Ok((relay, process)) => self.attend(&dir, &process, end, &mut signals, relay).await,
            Err(error) => Err(error),
        };
        if exit.is_err() {
            put_down(&agent, call).await;
        }
        exit
    }

    /// Connects to the sandbox process, to hear of the container's end, and to the agent. Both
    /// serve as long as the container does.
    async fn connect(&self, dir: &StateDir) -> Result<(ContainerEnd, Agent)> {
        let exec_id = format!("exec-{:016x}", random_u64()?);
        let connected = async {
            let end = ContainerEnd::watch(dir).await?;
            Ok((end, Agent::connect(dir, &self.id, exec_id).await?))
        };
        connected.await.map_err(|error: Error| {
            log::debug!("{error}");
            Error::new(format!(
                "cannot exec in container {}: container not running (its microVM is ending or gone)",
                self.id
            ))
        })
    }

    /// Has the agent start the process, with its standard streams connected.
    async fn begin(
        &self,
        dir: &StateDir,
        agent: &Agent,
        call: &mut Call,
    ) -> Result<(Streaming, GuestProcess)> {
        let Ends { local, screen, mut console } =
            Ends::open(self.terminal.as_ref(), None, &self.preserved)?;
        if matches!(self.terminal, Some(Terminal::Inherited { .. })) {
            // The caller is this process, which hears of the changes of the size itself.
            console = terminal::of_this_process();
        } else {
            stdio::release(if self.detached { Release::All } else { Release::but_for_messages() })?;
        }
        let (tokens, streams) = local.connect(dir).await?;
        agent.hold().await?;
        let (caller, process, cgroup) = (agent.clone(), self.process.clone(), self.cgroup.clone());
        let task =
            async move { caller.exec_process(&process, cgroup.as_deref(), tokens, screen).await };
        *call = Call::Made(tokio::spawn(task));
        if let Call::Made(task) = call {
            let answer = task.await;
            *call = Call::NotMade;
            answer.map_err(|_| Error::new("the start of the process was aborted"))??;
            *call = Call::Answered;
        }
        let relay = if self.detached && streams.have_output() {
            Streaming::Apart(streams.relay_apart(self.memory())?)
        } else {
            Streaming::Here(streams.relay()?)
        };
        Ok((relay, GuestProcess::new(agent.clone(), console)))
    }

    /// The size of the microVM's memory in bytes.
    fn memory(&self) -> u64 {
        self.memory_mib << 20
    }

    /// Passes signals on to the process until it ends, and passes on its output.
    ///
    /// In the foreground the output is passed on to its end, as with runc. For a detached exec
    /// everything is passed on that the process can have written.
    async fn attend(
        &self,
        dir: &StateDir,
        process: &GuestProcess,
        end: ContainerEnd,
        signals: &mut Signals,
        relay: Streaming,
    ) -> Result<Exit> {
        // The terminal's size may have changed while the process was started.
        process.pass_on(WINCH);
        let mut waiting = pin!(process.agent.wait_with_output());
        let exit = loop {
            tokio::select! {
                biased;
                exit = &mut waiting => break exit,
                number = signals.next() => process.pass_on(number),
            }
        };
        match exit {
            Ok((exit, written)) => {
                match relay {
                    Streaming::Apart(relay) => relay.written(&written).await,
                    Streaming::Here(mut relay) => tokio::select! {
                        () = relay.outputs_ended() => {}
                        // The process that the signal is meant for has ended.
                        _ = signals.next_ending() => {}
                    },
                }
                Ok(exit)
            }
            Err(error) => {
                let exit = self.exit_with_container(dir, end, error).await?;
                match relay {
                    Streaming::Apart(relay) => relay.written(&[]).await,
                    Streaming::Here(mut relay) => relay.finished(self.memory()).await,
                }
                Ok(exit)
            }
        }
    }

    /// The exit of the process when the connection to its agent broke. If the container ended in
    /// order, all of its processes were killed with it. Otherwise the exit status is unknown.
    async fn exit_with_container(
        &self,
        dir: &StateDir,
        end: ContainerEnd,
        error: Error,
    ) -> Result<Exit> {
        let (exit, cause) = match timeout(END_TIMEOUT, end.heard()).await.ok().flatten() {
            Some(ended) => (ended.exit, ended.error),
            // The sandbox process may have written the record and then have been killed.
            None => (Record::read(dir).ok().flatten().and_then(|record| record.exit), None),
        };
        match exit {
            Some(_) => Ok(Exit::KILLED),
            None => Err(Error::with_kind(
                ErrorKind::VmLost,
                format!(
                    "the microVM of container {} is lost, and the exit status of the process is \
                     unknown: {}",
                    self.id,
                    cause.unwrap_or(error).message
                ),
            )),
        }
    }
}

/// Runs an action that needs the guest, unless it takes too long or a signal interrupts it.
async fn bounded<T>(signals: &mut Signals, action: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::select! {
        done = timeout(START_TIMEOUT, action) => done.unwrap_or_else(|_| {
            Err(Error::new("the process was not started in time by the guest"))
        }),
        number = signals.next_ending() => {
            Err(Error::new(format!("interrupted by signal {number}")))
        }
    }
}

/// Kills the process of a failed exec, if there is a process or soon will be.
async fn put_down(agent: &Agent, call: Call) {
    let killed = timeout(PUT_DOWN_TIMEOUT, async {
        match call {
            Call::NotMade => return Ok(()),
            // The process cannot be killed before it has been started.
            Call::Made(task) => match task.await {
                Ok(Ok(())) => {}
                _ => return Ok(()),
            },
            Call::Answered => {}
        }
        agent.signal(KILL, false).await
    });
    match killed.await {
        Ok(Ok(())) => {}
        // The process has ended, or its microVM has.
        Ok(Err(error)) => log::debug!("{error}"),
        Err(_) => log::warn!("the guest does not answer, so the process may be left in it"),
    }
}

//! Calls to the agent. What it answers comes from the guest and is treated so.

use std::{future::poll_fn, task::Poll};

use oci_spec::runtime::{LinuxResources, Process, Spec};
use serde_json::Value;
use ttrpc::{Code, r#async::transport::Socket, context::Context};

use isopod_protocol::{
    AGENT_PORT, SHARED_TAG,
    agent::{
        AdjustClockRequest, ContainerRef, ContainerStats, CreateContainerRequest, Empty,
        ExecProcessRequest, Network, ProcessInfo, ProcessRef, ResizeTerminalRequest,
        SetupNetworkRequest, SetupSandboxRequest, SharedMemory, SignalProcessRequest, StreamTokens,
        TerminalSize, UpdateContainerRequest, WaitOomRequest,
    },
    agent_ttrpc::AgentClient,
};

use super::{
    launch::{Launch, Terminal},
    printable, random, vsock,
};
use crate::{
    bundle::{Filter, Shm},
    clock,
    error::{Error, ErrorKind, Explain, Result},
    state::{Exit, Id, StateDir},
    terminal::Size,
};

/// Random bytes that the guest's pool gets.
const ENTROPY_LEN: usize = 64;

/// A connection to the agent, and the process it is about. Clones share the connection.
#[derive(Clone)]
pub(super) struct Agent {
    client: AgentClient,
    container_id: String,
    /// Empty for the container's first process.
    exec_id: String,
}

impl Agent {
    /// Connects to the agent of the sandbox whose state directory is `dir`.
    ///
    /// # Errors
    ///
    /// As [`vsock::connect`].
    pub(super) async fn connect(dir: &StateDir, id: &Id, exec_id: String) -> Result<Self> {
        let stream = vsock::connect(dir, AGENT_PORT).await?;
        let client = AgentClient::new(ttrpc::r#async::Client::new(Socket::new(stream)));
        Ok(Self { client, container_id: id.to_string(), exec_id })
    }

    /// Prepares the guest: the share, the clock, randomness.
    pub(super) async fn setup_sandbox(&self) -> Result<()> {
        let mut entropy = vec![0; ENTROPY_LEN];
        random(&mut entropy)?;
        let request = SetupSandboxRequest {
            shared_tag: SHARED_TAG.to_owned(),
            realtime_ns: clock::realtime_ns(),
            entropy,
            ..Default::default()
        };
        self.client
            .setup_sandbox(Context::default(), &request)
            .await
            .map(drop)
            .map_err(|e| explain("cannot set up the guest", e))
    }

    /// Moves the guest's wall clock by a difference, and returns what it then reads in nanoseconds since
    /// the epoch.
    pub(super) async fn adjust_clock(&self, difference_ns: i64, gradually: bool) -> Result<u64> {
        let request = AdjustClockRequest { difference_ns, gradually, ..Default::default() };
        let reading = self.client.adjust_clock(Context::default(), &request).await;
        reading.map(|reading| reading.realtime_ns).map_err(|e| explain("cannot set the clock", e))
    }

    /// Builds the container of a launch, with config.json as the guest gets it. `state` is for hooks in
    /// the guest.
    pub(super) async fn create_container(
        &self,
        launch: &Launch,
        spec: &Spec,
        state: Option<&Value>,
        streams: StreamTokens,
        screen: Screen,
        network: Option<Network>,
    ) -> Result<()> {
        let seccomp = launch.seccomp.as_ref();
        let memories = launch.binds.iter().filter_map(|bind| bind.shm.as_ref());
        let request = CreateContainerRequest {
            container_id: self.container_id.clone(),
            spec_json: serde_json::to_vec(spec).explain(|| "cannot write config.json".into())?,
            streams: Some(streams).into(),
            terminal_size: screen.size.map(terminal_size).into(),
            plain_newlines: screen.plain_newlines,
            seccomp_filter: seccomp.map(Filter::bytes).unwrap_or_default(),
            seccomp_flags: seccomp.map_or(0, |filter| filter.flags),
            network: network.into(),
            shared_memory: memories.map(memory).collect(),
            state_json: state.map(|state| state.to_string().into_bytes()).unwrap_or_default(),
            ..Default::default()
        };
        self.client
            .create_container(Context::default(), &request)
            .await
            .map(drop)
            .map_err(|e| explain("cannot create the container", e))
    }

    /// Gives the container a network that it did not have when it was created.
    pub(super) async fn setup_network(&self, network: Network) -> Result<()> {
        let request = SetupNetworkRequest {
            container_id: self.container_id.clone(),
            network: Some(network).into(),
            ..Default::default()
        };
        self.client
            .setup_network(Context::default(), &request)
            .await
            .map(drop)
            .map_err(|e| explain("cannot set up the container's network", e))
    }

    /// Starts the container's process.
    pub(super) async fn start_container(&self) -> Result<()> {
        self.client
            .start_container(Context::default(), &self.container())
            .await
            .map(drop)
            .map_err(|e| explain("cannot start the container", e))
    }

    /// Owns the process of an exec that is to be started by this connection: when that goes, the guest
    /// kills the process.
    pub(super) async fn hold(&self) -> Result<()> {
        let request = self.process();
        let client = self.client.clone();
        let mut call =
            Box::pin(async move { client.hold_process(Context::default(), &request).await });
        // The call has no answer. With this it is on its way, before those that follow.
        let sent = poll_fn(|context| Poll::Ready(call.as_mut().poll(context))).await;
        match sent {
            Poll::Pending => {
                tokio::spawn(call);
                Ok(())
            }
            Poll::Ready(Err(e)) => Err(explain("cannot run the process", e)),
            Poll::Ready(Ok(_)) => {
                Err(Error::new("cannot run the process: the agent does not own it"))
            }
        }
    }

    /// Runs another process in the container, in this group below the container's own.
    pub(super) async fn exec_process(
        &self,
        process: &Process,
        cgroup: Option<&str>,
        streams: StreamTokens,
        screen: Screen,
    ) -> Result<()> {
        let request = ExecProcessRequest {
            container_id: self.container_id.clone(),
            exec_id: self.exec_id.clone(),
            process_json: serde_json::to_vec(process)
                .explain(|| "cannot write the process".into())?,
            cgroup: cgroup.unwrap_or_default().to_owned(),
            streams: Some(streams).into(),
            terminal_size: screen.size.map(terminal_size).into(),
            plain_newlines: screen.plain_newlines,
            ..Default::default()
        };
        self.client
            .exec_process(Context::default(), &request)
            .await
            .map(drop)
            .map_err(|e| explain("cannot run the process", e))
    }

    /// Waits for the end of the process, however long that takes.
    pub(super) async fn wait(&self) -> Result<Exit> {
        self.wait_with_output().await.map(|(exit, _)| exit)
    }

    /// As [`Self::wait`]. Returns as well how much had been written by then to each of the process's
    /// outputs, in the order of [`Streams`](super::stdio::Streams).
    pub(super) async fn wait_with_output(&self) -> Result<(Exit, Vec<u64>)> {
        let exit = self
            .client
            .wait_process(Context::default(), &self.process())
            .await
            .map_err(|e| explain("cannot wait for the process", e))?;
        let status = u8::try_from(exit.status).map_err(|_| {
            Error::new(format!("the agent reported exit status {}, which none is", exit.status))
        })?;
        Ok((Exit { status, oom_killed: exit.oom_killed }, exit.written))
    }

    fn process(&self) -> ProcessRef {
        ProcessRef {
            container_id: self.container_id.clone(),
            exec_id: self.exec_id.clone(),
            ..Default::default()
        }
    }

    /// Sends a signal to the process, or to all of the container's.
    pub(super) async fn signal(&self, signal: u32, all: bool) -> Result<()> {
        let request = SignalProcessRequest {
            container_id: self.container_id.clone(),
            exec_id: if all { String::new() } else { self.exec_id.clone() },
            signal,
            all,
            ..Default::default()
        };
        self.client.signal_process(Context::default(), &request).await.map(drop).map_err(|e| {
            match &e {
                // The process has just ended. The wording is what callers of runc look for.
                ttrpc::Error::RpcStatus(status)
                    if self.exec_id.is_empty()
                        && status.code.enum_value() == Ok(Code::FAILED_PRECONDITION) =>
                {
                    let id = &self.container_id;
                    Error::new(format!("cannot kill container {id}: container not running"))
                }
                _ => explain("cannot send the signal", e),
            }
        })
    }

    /// Stops the container's processes where they are.
    pub(super) async fn pause(&self) -> Result<()> {
        let answer = self.client.pause_container(Context::default(), &self.container()).await;
        answer
            .map(drop)
            .map_err(|e| explain(&format!("cannot pause container {}", self.container_id), e))
    }

    /// Lets them go on.
    pub(super) async fn resume(&self) -> Result<()> {
        let answer = self.client.resume_container(Context::default(), &self.container()).await;
        answer
            .map(drop)
            .map_err(|e| explain(&format!("cannot resume container {}", self.container_id), e))
    }

    /// Sets the container's limits, all of which are given.
    pub(super) async fn update(&self, resources: &LinuxResources) -> Result<()> {
        let what = format!("cannot update container {}", self.container_id);
        let request = UpdateContainerRequest {
            container_id: self.container_id.clone(),
            resources_json: serde_json::to_vec(resources).explain(|| what.clone())?,
            ..Default::default()
        };
        let answer = self.client.update_container(Context::default(), &request).await;
        answer.map(drop).map_err(|e| explain(&what, e))
    }

    /// The container's processes.
    pub(super) async fn processes(&self) -> Result<Vec<ProcessInfo>> {
        let answer = self.client.list_processes(Context::default(), &self.container()).await;
        answer.map(|list| list.processes).map_err(|e| explain("cannot list the processes", e))
    }

    /// What the container uses.
    pub(super) async fn stats(&self) -> Result<ContainerStats> {
        let answer = self.client.container_stats(Context::default(), &self.container()).await;
        answer.map_err(|e| explain("cannot ask what the container uses", e))
    }

    /// Waits until the count of the container's processes that the kernel has killed for its memory
    /// limit is not `seen`, or the container has ended. Returns the count, and whether it has.
    pub(super) async fn wait_oom(&self, seen: u64) -> Result<(u64, bool)> {
        let request =
            WaitOomRequest { container_id: self.container_id.clone(), seen, ..Default::default() };
        let answer = self.client.wait_oom(Context::default(), &request).await;
        let kills = answer.map_err(|e| explain("cannot watch the container's memory", e))?;
        Ok((kills.count, kills.ended))
    }

    /// Has the guest forget the files that nobody uses in it.
    pub(super) async fn forget_files(&self) -> Result<()> {
        let answer = self.client.forget_files(Context::default(), &Empty::default()).await;
        answer.map(drop).map_err(|e| explain("cannot have the guest forget files", e))
    }

    /// Ends and forgets the container, if it is there.
    pub(super) async fn delete_container(&self) -> Result<()> {
        let answer = self.client.delete_container(Context::default(), &self.container()).await;
        answer
            .map(drop)
            .map_err(|e| explain(&format!("cannot end container {}", self.container_id), e))
    }

    fn container(&self) -> ContainerRef {
        ContainerRef { container_id: self.container_id.clone(), ..Default::default() }
    }

    /// Tells the process's terminal its size.
    pub(super) async fn resize(&self, size: Size) -> Result<()> {
        let request = ResizeTerminalRequest {
            container_id: self.container_id.clone(),
            exec_id: self.exec_id.clone(),
            size: Some(terminal_size(size)).into(),
            ..Default::default()
        };
        self.client
            .resize_terminal(Context::default(), &request)
            .await
            .map(drop)
            .map_err(|e| explain("cannot resize the terminal", e))
    }

    /// Asks the guest to flush its file systems and to end. The connection may close first.
    pub(super) async fn shutdown(&self) -> Result<()> {
        match self.client.shutdown(Context::default(), &Empty::default()).await {
            Ok(_) => Ok(()),
            Err(ttrpc::Error::RpcStatus(status)) => {
                Err(explain("cannot shut the guest down", ttrpc::Error::RpcStatus(status)))
            }
            Err(_) => Ok(()),
        }
    }
}

/// How a process's terminal is to begin.
#[derive(Debug, Clone, Copy)]
pub(super) struct Screen {
    size: Option<Size>,
    plain_newlines: bool,
}

impl Screen {
    /// What goes to the standard streams of a caller that stays has lines made of it there, if one of
    /// them is a terminal. An engine that asks for the terminal itself gets it as programs expect one.
    pub(super) fn of(terminal: Option<&Terminal>, size: Option<Size>) -> Self {
        Self { size, plain_newlines: matches!(terminal, Some(Terminal::Inherited { .. })) }
    }
}

fn memory(shm: &Shm) -> SharedMemory {
    SharedMemory {
        key: shm.key.clone(),
        size: shm.size,
        mode: shm.mode,
        uid: shm.uid,
        gid: shm.gid,
        ..Default::default()
    }
}

fn terminal_size(size: Size) -> TerminalSize {
    TerminalSize { columns: size.columns.into(), rows: size.rows.into(), ..Default::default() }
}

/// A failed call. A broken connection means that the microVM is going or gone.
fn explain(what: &str, error: ttrpc::Error) -> Error {
    match error {
        ttrpc::Error::RpcStatus(status) => {
            Error::new(format!("{what}: {}", printable(&status.message)))
        }
        // A call on a connection that has just broken, or an answer that is none.
        ttrpc::Error::Others(message) => Error::with_kind(
            ErrorKind::VmLost,
            format!("{what}: the connection to the microVM failed: {}", printable(&message)),
        ),
        _ => Error::with_kind(
            ErrorKind::VmLost,
            format!("{what}: the connection to the microVM is broken"),
        ),
    }
}

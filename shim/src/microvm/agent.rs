//! Calls to the agent. Its answers come from the guest, so they are not trusted.

use oci_spec::runtime::{LinuxResources, Process};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use ttrpc::{Code, r#async::transport::Socket, context::Context};

use isopod_protocol::{
    AGENT_PORT, SHARED_TAG,
    agent::{
        self, AdjustClockRequest, ContainerRef, ContainerStats, CreateContainerRequest, DiskRef,
        Empty, ExecProcessRequest, ForwardPortRequest, Network, ProcessInfo, ProcessRef,
        ResizeTerminalRequest, SetupGuestRequest, SetupNetworkRequest, SharedMemory,
        SignalProcessRequest, StreamTokens, TerminalSize, UpdateContainerRequest, VolumeContent,
        WaitOomRequest,
    },
    agent_ttrpc::AgentClient,
};

use crate::{
    bundle::{Filter, GuestContainer, GuestDisk, HostSocket, Shm},
    call_times::{self, Service},
    clock,
    container_id::ContainerId,
    error::{Error, ErrorKind, Explain, Result},
    microvm::vsock,
    random::fill,
    state::{Exit, StateDir},
    terminal::{Size, Terminal},
    text::printable,
};

/// Number of random bytes for the guest's entropy pool.
const ENTROPY_LEN: usize = 64;

/// Longest name of a disk in the guest.
const MAX_DISK_NAME: usize = 32;

/// A connection to the agent, and the process that calls are about. Clones share the connection.
#[derive(Clone)]
pub(crate) struct Agent {
    client: AgentClient,
    /// Empty for calls about the guest as a whole.
    container_id: String,
    /// Empty for the container's first process.
    exec_id: String,
}

impl Agent {
    /// Connects to the agent of the sandbox whose state directory is `dir`.
    pub(crate) async fn connect(dir: &StateDir) -> Result<Self> {
        let stream = vsock::connect(dir, AGENT_PORT).await?;
        let client = AgentClient::new(ttrpc::r#async::Client::new(Socket::new(stream)));
        Ok(Self { client, container_id: String::new(), exec_id: String::new() })
    }

    /// The same connection, about a container and its first process.
    pub(crate) fn of_container(&self, id: &ContainerId) -> Self {
        let client = self.client.clone();
        Self { client, container_id: id.to_string(), exec_id: String::new() }
    }

    /// The same connection, about a further process of the container.
    pub(crate) fn of_process(&self, exec_id: String) -> Self {
        Self { exec_id, ..self.clone() }
    }

    /// Prepares the guest: the share, the clock, randomness.
    pub(crate) async fn setup_guest(&self) -> Result<()> {
        let mut entropy = vec![0; ENTROPY_LEN];
        fill(&mut entropy)?;
        let request = SetupGuestRequest {
            shared_tag: SHARED_TAG.to_owned(),
            realtime_ns: clock::realtime_ns(),
            entropy,
            ..Default::default()
        };
        timed("SetupGuest", self.client.setup_guest(Context::default(), &request))
            .await
            .map(drop)
            .map_err(|e| explain("cannot set up the guest", e))
    }

    /// Moves the guest's wall clock by a difference. Returns its reading after that, in nanoseconds
    /// since the epoch.
    pub(crate) async fn adjust_clock(&self, difference_ns: i64, gradually: bool) -> Result<u64> {
        let request = AdjustClockRequest { difference_ns, gradually, ..Default::default() };
        let reading =
            timed("AdjustClock", self.client.adjust_clock(Context::default(), &request)).await;
        reading.map(|reading| reading.realtime_ns).map_err(|e| explain("cannot set the clock", e))
    }

    /// Builds a container. `state` is for hooks in the guest.
    pub(crate) async fn create_container(
        &self,
        container: &GuestContainer,
        state: Option<&Value>,
        streams: StreamTokens,
        screen: Screen,
        network: Option<Network>,
        volumes: Vec<VolumeContent>,
    ) -> Result<()> {
        let seccomp = container.seccomp.as_ref();
        let request = CreateContainerRequest {
            container_id: self.container_id.clone(),
            spec_json: serde_json::to_vec(&container.spec)
                .explain(|| "cannot write config.json".into())?,
            streams: Some(streams).into(),
            terminal_size: screen.size.map(terminal_size).into(),
            plain_newlines: screen.plain_newlines,
            seccomp_filter: seccomp.map(Filter::bytes).unwrap_or_default(),
            seccomp_flags: seccomp.map_or(0, |filter| filter.flags),
            network: network.into(),
            shared_memory: container.shared_memory.iter().map(memory).collect(),
            volumes,
            host_sockets: container.host_sockets.iter().map(host_socket).collect(),
            state_json: state.map(|state| state.to_string().into_bytes()).unwrap_or_default(),
            ..Default::default()
        };
        timed("CreateContainer", self.client.create_container(Context::default(), &request))
            .await
            .map(drop)
            .map_err(|e| explain("cannot create the container", e))
    }

    /// Gives the container a network that it lacked when it was created.
    pub(crate) async fn setup_network(&self, network: Network) -> Result<()> {
        let request = SetupNetworkRequest {
            container_id: self.container_id.clone(),
            network: Some(network).into(),
            ..Default::default()
        };
        timed("SetupNetwork", self.client.setup_network(Context::default(), &request))
            .await
            .map(drop)
            .map_err(|e| explain("cannot set up the container's network", e))
    }

    /// Connects the stream of this token with a port at loopback in the container's network.
    pub(crate) async fn forward_port(&self, port: u16, ipv6: bool, stream: u64) -> Result<()> {
        let request = ForwardPortRequest {
            container_id: self.container_id.clone(),
            port: port.into(),
            ipv6,
            stream,
            ..Default::default()
        };
        let answer =
            timed("ForwardPort", self.client.forward_port(Context::default(), &request)).await;
        answer.map(drop).map_err(|e| explain(&format!("cannot connect to port {port}"), e))
    }

    /// Replaces the content of the guest's copy of a volume.
    pub(crate) async fn update_volume(&self, content: VolumeContent) -> Result<()> {
        let call = self.client.update_volume(Context::default(), &content);
        let answer = timed("UpdateVolume", call).await;
        answer.map(drop).map_err(|e| explain("cannot write to it", e))
    }

    /// Has the guest look at a disk that the VMM has attached: device `virtio-mmio.<number>`.
    pub(crate) async fn attach_disk(&self, number: u32) -> Result<GuestDisk> {
        let request = DiskRef { number, ..Default::default() };
        let call = self.client.attach_disk(Context::default(), &request);
        let answer = timed("AttachDisk", call).await;
        let disk = answer.map_err(|e| explain("the guest does not take the disk", e))?;
        let usable = (1..=MAX_DISK_NAME).contains(&disk.name.len())
            && disk.name.bytes().all(|b| b.is_ascii_alphanumeric());
        if !usable {
            return Err(Error::new("the guest gave the disk a name that no disk has"));
        }
        Ok(GuestDisk { major: disk.major, minor: disk.minor, name: disk.name })
    }

    /// Has the guest write back a disk and give it up.
    pub(crate) async fn detach_disk(&self, number: u32) -> Result<()> {
        let request = DiskRef { number, ..Default::default() };
        let call = self.client.detach_disk(Context::default(), &request);
        let answer = timed("DetachDisk", call).await;
        answer.map(drop).map_err(|e| explain("the guest does not give it up", e))
    }

    /// Starts the container's process.
    pub(crate) async fn start_container(&self) -> Result<()> {
        timed("StartContainer", self.client.start_container(Context::default(), &self.container()))
            .await
            .map(drop)
            .map_err(|e| explain("cannot start the container", e))
    }

    /// Runs another process in the container. `cgroup` is a group below the container's own.
    pub(crate) async fn exec_process(
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
        timed("ExecProcess", self.client.exec_process(Context::default(), &request))
            .await
            .map(drop)
            .map_err(|e| explain("cannot run the process", e))
    }

    /// Waits for the end of the process, however long it takes. Also returns the number of bytes
    /// that had been written by then to each output: to the descriptors from 3 on, then to standard
    /// output and standard error.
    pub(crate) async fn wait(&self) -> Result<(Exit, Vec<u64>)> {
        let exit = self
            .client
            .wait_process(Context::default(), &self.process())
            .await
            .map_err(|e| explain("cannot wait for the process", e))?;
        let status = u8::try_from(exit.status).map_err(|_| {
            Error::new(format!("the agent reported exit status {}, above 255", exit.status))
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

    /// Sends a signal to the process, or to all processes of the container.
    pub(crate) async fn signal(&self, signal: u32, all: bool) -> Result<()> {
        let request = SignalProcessRequest {
            container_id: self.container_id.clone(),
            exec_id: if all { String::new() } else { self.exec_id.clone() },
            signal,
            all,
            ..Default::default()
        };
        timed("SignalProcess", self.client.signal_process(Context::default(), &request))
            .await
            .map(drop)
            .map_err(|e| {
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

    /// Pauses the container's processes.
    pub(crate) async fn pause(&self) -> Result<()> {
        let answer = timed(
            "PauseContainer",
            self.client.pause_container(Context::default(), &self.container()),
        )
        .await;
        answer
            .map(drop)
            .map_err(|e| explain(&format!("cannot pause container {}", self.container_id), e))
    }

    /// Resumes the container's processes.
    pub(crate) async fn resume(&self) -> Result<()> {
        let answer = timed(
            "ResumeContainer",
            self.client.resume_container(Context::default(), &self.container()),
        )
        .await;
        answer
            .map(drop)
            .map_err(|e| explain(&format!("cannot resume container {}", self.container_id), e))
    }

    /// Sets the container's limits. `resources` has all limits, not only the changed ones.
    pub(crate) async fn update(&self, resources: &LinuxResources) -> Result<()> {
        let what = format!("cannot update container {}", self.container_id);
        let request = UpdateContainerRequest {
            container_id: self.container_id.clone(),
            resources_json: serde_json::to_vec(resources).explain(|| what.clone())?,
            ..Default::default()
        };
        let answer =
            timed("UpdateContainer", self.client.update_container(Context::default(), &request))
                .await;
        answer.map(drop).map_err(|e| explain(&what, e))
    }

    /// Lists the container's processes.
    pub(crate) async fn processes(&self) -> Result<Vec<ProcessInfo>> {
        let answer = timed(
            "ListProcesses",
            self.client.list_processes(Context::default(), &self.container()),
        )
        .await;
        answer.map(|list| list.processes).map_err(|e| explain("cannot list the processes", e))
    }

    /// Reads the resource use of the container.
    pub(crate) async fn stats(&self) -> Result<ContainerStats> {
        let answer = timed(
            "ContainerStats",
            self.client.container_stats(Context::default(), &self.container()),
        )
        .await;
        answer.map_err(|e| explain("cannot ask what the container uses", e))
    }

    /// Waits until the container has ended, or the count of its processes that the kernel has
    /// killed for its memory limit is not `seen`. Returns the count, and true if the container has
    /// ended.
    pub(crate) async fn wait_oom(&self, seen: u64) -> Result<(u64, bool)> {
        let request =
            WaitOomRequest { container_id: self.container_id.clone(), seen, ..Default::default() };
        let answer = self.client.wait_oom(Context::default(), &request).await;
        let kills = answer.map_err(|e| explain("cannot watch the container's memory", e))?;
        Ok((kills.count, kills.ended))
    }

    /// Has the guest forget the files that nobody uses in it.
    pub(crate) async fn drop_caches(&self) -> Result<()> {
        let answer =
            timed("DropCaches", self.client.drop_caches(Context::default(), &Empty::default()))
                .await;
        answer.map(drop).map_err(|e| explain("cannot have the guest forget files", e))
    }

    /// Ends and forgets a further process, if the guest has it.
    pub(crate) async fn delete_process(&self) -> Result<()> {
        let answer =
            timed("DeleteProcess", self.client.delete_process(Context::default(), &self.process()))
                .await;
        answer.map(drop).map_err(|e| explain("cannot end the process", e))
    }

    /// Ends and forgets the container, if the guest has it.
    pub(crate) async fn delete_container(&self) -> Result<()> {
        let answer = timed(
            "DeleteContainer",
            self.client.delete_container(Context::default(), &self.container()),
        )
        .await;
        answer
            .map(drop)
            .map_err(|e| explain(&format!("cannot end container {}", self.container_id), e))
    }

    fn container(&self) -> ContainerRef {
        ContainerRef { container_id: self.container_id.clone(), ..Default::default() }
    }

    /// Sets the size of the process's terminal.
    pub(crate) async fn resize(&self, size: Size) -> Result<()> {
        let request = ResizeTerminalRequest {
            container_id: self.container_id.clone(),
            exec_id: self.exec_id.clone(),
            size: Some(terminal_size(size)).into(),
            ..Default::default()
        };
        timed("ResizeTerminal", self.client.resize_terminal(Context::default(), &request))
            .await
            .map(drop)
            .map_err(|e| explain("cannot resize the terminal", e))
    }

    /// Asks the guest to flush its file systems and to end. The connection may close before the
    /// answer.
    pub(crate) async fn shutdown(&self) -> Result<()> {
        match timed("Shutdown", self.client.shutdown(Context::default(), &Empty::default())).await {
            Ok(_) => Ok(()),
            Err(ttrpc::Error::RpcStatus(status)) => {
                Err(explain("cannot shut the guest down", ttrpc::Error::RpcStatus(status)))
            }
            Err(_) => Ok(()),
        }
    }
}

/// Settings with which a process's terminal begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Screen {
    size: Option<Size>,
    plain_newlines: bool,
}

impl Screen {
    /// Settings by the terminal's host side. For a caller that stays, newlines pass unchanged: a
    /// terminal among its streams adds the carriage returns. An engine that asks for the terminal
    /// gets it as programs expect a terminal.
    pub(crate) fn of(terminal: Option<&Terminal>, size: Option<Size>) -> Self {
        Self { size, plain_newlines: matches!(terminal, Some(Terminal::Inherited { .. })) }
    }
}

/// Makes a call, and counts its time. Calls that wait for an event are made without this.
async fn timed<T>(method: &'static str, call: impl Future<Output = T>) -> T {
    call_times::timed(Service::Agent, method, call).await
}

fn host_socket(socket: &HostSocket) -> agent::HostSocket {
    agent::HostSocket {
        mount: socket.mount,
        token: socket.token.to_vec(),
        mode: socket.mode,
        uid: socket.uid,
        gid: socket.gid,
        ..Default::default()
    }
}

fn memory(shm: &Shm) -> SharedMemory {
    SharedMemory {
        key: shm.key.clone(),
        size: shm.size,
        mode: shm.mode,
        uid: shm.uid,
        gid: shm.gid,
        executable: shm.executable,
        ..Default::default()
    }
}

fn terminal_size(size: Size) -> TerminalSize {
    TerminalSize { columns: size.columns.into(), rows: size.rows.into(), ..Default::default() }
}

/// Explains a failed call. A broken connection means that the microVM is ending or gone.
fn explain(what: &str, error: ttrpc::Error) -> Error {
    match error {
        ttrpc::Error::RpcStatus(status) => {
            Error::new(format!("{what}: {}", printable(&status.message)))
        }
        // The connection broke during the call, or the answer is malformed.
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

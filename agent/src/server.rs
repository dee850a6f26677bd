//! Listens, tells the host, and serves.

use std::fs;
use std::io::{self, Write as _};
use std::os::fd::{IntoRawFd as _, OwnedFd};
use std::sync::Arc;

use isopod_protocol::{AGENT_PORT, Hello, PROTOCOL_VERSION, READY_PORT, STREAM_PORT, agent_ttrpc};
use rustix::net::AddressFamily;
use rustix::time::{ClockId, clock_gettime};
use ttrpc::r#async::Server;
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener, VsockStream};

use crate::error::{Context as _, Error, Result};
use crate::guest::Guest;
use crate::log::log_error;
use crate::reaper::Reaper;
use crate::rpc::AgentService;
use crate::stream::Streams;

/// The two listening sockets that the host connects to.
pub struct Listeners {
    /// Socket for the calls of agent.proto.
    pub agent: OwnedFd,
    /// Socket for stdio streams.
    pub streams: OwnedFd,
}

impl Listeners {
    /// Listens on the protocol's vsock ports.
    pub(crate) fn vsock() -> Result<Self> {
        let listen = |port| {
            VsockListener::bind_with_cid_port(VMADDR_CID_ANY, port)
                .map(OwnedFd::from)
                .context(|| format!("listen on vsock port {port}"))
        };
        Ok(Self { agent: listen(AGENT_PORT)?, streams: listen(STREAM_PORT)? })
    }
}

/// Serves until the guest is shut down.
pub(crate) fn serve(listeners: Listeners, ready: impl FnOnce()) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(|| "start the runtime")?;
    runtime.block_on(async {
        let reaper = Arc::new(Reaper::default());
        reaper.run()?;
        let streams = Arc::new(Streams::default());
        streams.serve(listeners.streams)?;
        let guest = Arc::new(Guest::new(reaper, streams));
        let service = agent_ttrpc::create_agent(Arc::new(AgentService(guest)));
        let mut server = listen(listeners.agent)?.register_service(service);
        server.start().await.map_err(|e| Error::internal(format!("serve the host: {e}")))?;
        ready();
        std::future::pending::<()>().await;
        Ok(())
    })
}

fn listen(listener: OwnedFd) -> Result<Server> {
    let family = rustix::net::sockopt::socket_domain(&listener)
        .context(|| "read the address family of a listener")?;
    let fd = listener.into_raw_fd();
    let server = if family == AddressFamily::UNIX {
        // SAFETY: the descriptor is a listening unix socket and has just been given up above.
        unsafe { Server::new().add_unix_listener(fd) }
    } else {
        // SAFETY: the descriptor is a listening vsock socket and has just been given up above.
        unsafe { Server::new().add_vsock_listener(fd) }
    };
    server.map_err(|e| Error::internal(format!("serve the host: {e}")))
}

/// Tells the host that both ports are served. If that fails, the host stops waiting in time, and
/// the kernel log has the reason.
pub(crate) fn say_hello(init_us: u64) {
    let told = || -> io::Result<()> {
        let mut stream = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, READY_PORT)?;
        let mut line = serde_json::to_vec(&Hello {
            protocol: PROTOCOL_VERSION,
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            init_us,
            ready_us: boot_time_us(),
            memory_used_kib: memory_used_kib()?,
        })?;
        line.push(b'\n');
        stream.write_all(&line)
    };
    if let Err(e) = told() {
        log_error!(
            "cannot tell the host on vsock port {READY_PORT} that the sandbox is ready: {e}"
        );
    }
}

/// Microseconds since the guest's kernel started, with time spent suspended.
pub(crate) fn boot_time_us() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    now.tv_sec.unsigned_abs() * 1_000_000 + now.tv_nsec.unsigned_abs() / 1000
}

fn memory_used_kib() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let kib = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').trim().strip_suffix(" kB")?.parse::<u64>().ok()
    };
    match (kib("MemTotal"), kib("MemAvailable")) {
        (Some(total), Some(available)) => Ok(total.saturating_sub(available)),
        _ => Err(io::Error::other("/proc/meminfo has no MemAvailable")),
    }
}

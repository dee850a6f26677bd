//! Connections of the host to loopback in a container's network namespace: port forwarding.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};
use tokio::io::copy_bidirectional;

use crate::error::{Context as _, Error, Result};
use crate::stream::{Connection, in_event_loop};

/// Longest wait for a connection, whose other end is in the same namespace.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Most connections at a time. Each has two small buffers.
const MAX_FORWARDS: usize = 256;

/// Connections that are open now.
#[derive(Debug, Clone, Default)]
pub(crate) struct Forwards(Arc<AtomicUsize>);

/// A connection that counts, until this is dropped.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Forwards {
    /// Connects a stream of the host with a TCP connection, until both directions have ended.
    pub(crate) fn start(&self, host: Connection, tcp: TcpStream) -> Result<()> {
        let counted = Counted(Arc::clone(&self.0));
        if self.0.fetch_add(1, Ordering::Relaxed) >= MAX_FORWARDS {
            return Err(Error::state(format!("{MAX_FORWARDS} connections are forwarded already")));
        }
        let what = || "forward a connection";
        tcp.set_nonblocking(true).context(what)?;
        let mut tcp = tokio::net::TcpStream::from_std(tcp).context(what)?;
        let mut host = in_event_loop(host.into_inner()).context(what)?;
        tokio::spawn(async move {
            // Either end may break the connection. The other end sees it closed then.
            let _ = copy_bidirectional(&mut host, &mut tcp).await;
            drop(counted);
        });
        Ok(())
    }
}

/// Connects to a port at loopback in the network namespace of a process. FAILED_PRECONDITION if
/// nobody listens there.
pub(crate) fn connect(pidfd: &OwnedFd, port: u16, ipv6: bool) -> Result<TcpStream> {
    let ip: IpAddr = if ipv6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
    let address = SocketAddr::new(ip, port);
    // setns(2) changes a thread's namespace, so a short-lived thread enters the container's.
    std::thread::scope(|scope| {
        let inside = std::thread::Builder::new().spawn_scoped(scope, || {
            move_into_thread_name_spaces(pidfd.as_fd(), ThreadNameSpaceType::NETWORK)
                .context(|| "enter the container's network namespace")?;
            TcpStream::connect_timeout(&address, CONNECT_TIMEOUT)
                .map_err(|e| Error::state(format!("cannot connect to {address}: {e}")))
        });
        let inside = inside.context(|| "start the thread of a connection")?;
        inside.join().unwrap_or_else(|_| Err(Error::internal("the thread panicked")))
    })
}

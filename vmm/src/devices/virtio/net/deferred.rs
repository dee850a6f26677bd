//! A queue pair whose server is chosen at the driver's first kick. It belongs to a spare device,
//! made before the container's interfaces are known and perhaps never used.
//!
//! The first kick comes when the guest brings the interface up. Until then `/dev/vhost-net` may
//! have come. A descriptor open from the start would delay every microVM's end: closing it takes an
//! RCU grace period of the host's kernel.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::queue_pair::QueuePair;
use super::server::{PairServer, QueuePairParts};
use super::vhost::{VhostNet, VhostPair};
use crate::devices::virtio::queue::ActiveQueue;
use crate::devices::virtio::state::QueueState;
use crate::devices::virtio::worker::{Hold, Stop, Worker, wait_for_kick};

/// Descriptors of `/dev/vhost-net` that may come by a socket, one in each message.
pub(super) struct DeferredVhost {
    socket: UnixDatagram,
    come: Mutex<Vec<Arc<VhostNet>>>,
}

impl DeferredVhost {
    /// Takes the socket. Fails if the descriptor is not a socket.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let socket = UnixDatagram::from(fd);
        socket.set_nonblocking(true)?;
        Ok(Self { socket, come: Mutex::default() })
    }

    /// Returns the descriptor of a queue pair, the same in each call. `None` if too few have come.
    fn of_pair(&self, index: usize) -> io::Result<Option<Arc<VhostNet>>> {
        let mut come = self.come.lock().unwrap_or_else(PoisonError::into_inner);
        while come.len() <= index {
            match self.socket.recv_with_fd(&mut [0; 1]) {
                Ok((_, Some(file))) => come.push(Arc::new(VhostNet::new(file.into())?)),
                Ok((_, None)) => return Err(io::Error::other("a message has no descriptor")),
                Err(e) if e.errno() == libc::EAGAIN => return Ok(None),
                Err(e) => return Err(io::Error::from_raw_os_error(e.errno())),
            }
        }
        Ok(come.get(index).cloned())
    }
}

/// A queue pair and its server.
pub(super) struct DeferredPair {
    index: usize,
    vhost: Arc<DeferredVhost>,
    /// `None` after a failure.
    server: Option<DeferredServer>,
}

enum DeferredServer {
    Nobody(QueuePairParts),
    Kernel(VhostPair),
    Thread(QueuePair),
}

impl DeferredPair {
    pub(super) fn new(index: usize, vhost: Arc<DeferredVhost>, parts: QueuePairParts) -> Self {
        Self { index, vhost, server: Some(DeferredServer::Nobody(parts)) }
    }

    /// Waits for the first kick, then serves the queues or has them served until the stop.
    pub(super) fn run(&mut self, stop: &Stop) {
        if let Some(DeferredServer::Nobody(parts)) = &self.server {
            let [receive, transmit] = &parts.queues;
            // The kick stays unread for the server.
            if !wait_for_kick(stop, &[receive.kick(), transmit.kick()]) {
                return;
            }
        }
        if let Err(e) = self.serve(stop) {
            stop.fail(format!("a network device cannot be served: vhost-net: {e}"));
        }
    }

    fn serve(&mut self, stop: &Stop) -> io::Result<()> {
        let server = match self.server.take() {
            Some(DeferredServer::Nobody(parts)) => match self.vhost.of_pair(self.index)? {
                Some(vhost) => DeferredServer::Kernel(VhostPair::new(vhost, parts)),
                None => DeferredServer::Thread(QueuePair::new(parts)),
            },
            Some(server) => server,
            None => return Ok(()),
        };
        match self.server.insert(server) {
            DeferredServer::Kernel(pair) => {
                pair.resume()?;
                wait_for_kick(stop, &[]);
                pair.hold();
            }
            DeferredServer::Thread(pair) => pair.run(stop),
            DeferredServer::Nobody(_) => {}
        }
        Ok(())
    }

    fn queues(&self) -> Option<[QueueState; 2]> {
        match self.server.as_ref()? {
            DeferredServer::Nobody(parts) => Some(parts.queues.each_ref().map(ActiveQueue::state)),
            DeferredServer::Kernel(pair) => pair.queues(),
            DeferredServer::Thread(pair) => Some(pair.queues()),
        }
    }
}

impl PairServer for Worker<DeferredPair> {
    fn queues(&self) -> Option<[QueueState; 2]> {
        self.held().and_then(DeferredPair::queues)
    }
}

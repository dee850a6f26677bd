//! A queue pair of a device that perhaps nobody will use, because it was made before anybody knew what
//! interfaces the container gets. Nothing of the host's serves it until its driver's first kick, which
//! comes when the guest brings the interface up, and by then `/dev/vhost-net` may have come. One that
//! was open from the start would have every microVM's end wait for the host's kernel: closing it
//! takes an RCU grace period.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::pair::Pair;
use super::vhost::{VhostNet, VhostPair};
use super::{Parts, Server};
use crate::devices::virtio::ActiveQueue;
use crate::devices::virtio::state::QueueState;
use crate::devices::virtio::worker::{Hold, Stop, Worker, wait_for_kick};

/// Descriptors of `/dev/vhost-net` that come by a socket, one with each message, if at all.
pub(super) struct LateVhost {
    socket: UnixDatagram,
    come: Mutex<Vec<Arc<VhostNet>>>,
}

impl LateVhost {
    /// # Errors
    ///
    /// When it is no socket.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let socket = UnixDatagram::from(fd);
        socket.set_nonblocking(true)?;
        Ok(Self { socket, come: Mutex::default() })
    }

    /// The descriptor for a queue pair, the same each time. `None` when too few have come.
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

/// A queue pair, and who serves it.
pub(super) struct LatePair {
    index: usize,
    vhost: Arc<LateVhost>,
    /// `None` once it has failed.
    server: Option<LateServer>,
}

enum LateServer {
    Nobody(Parts),
    Kernel(VhostPair),
    Thread(Pair),
}

impl LatePair {
    pub(super) fn new(index: usize, vhost: Arc<LateVhost>, parts: Parts) -> Self {
        Self { index, vhost, server: Some(LateServer::Nobody(parts)) }
    }

    /// Waits for the first kick, and serves or has it served until the stop.
    pub(super) fn run(&mut self, stop: &Stop) {
        if let Some(LateServer::Nobody(parts)) = &self.server {
            let [receive, transmit] = &parts.queues;
            // Left for whoever serves.
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
            Some(LateServer::Nobody(parts)) => match self.vhost.of_pair(self.index)? {
                Some(vhost) => LateServer::Kernel(VhostPair::new(vhost, parts)),
                None => LateServer::Thread(Pair::new(parts)),
            },
            Some(server) => server,
            None => return Ok(()),
        };
        match self.server.insert(server) {
            LateServer::Kernel(pair) => {
                pair.resume()?;
                wait_for_kick(stop, &[]);
                pair.hold();
            }
            LateServer::Thread(pair) => pair.run(stop),
            LateServer::Nobody(_) => {}
        }
        Ok(())
    }

    fn queues(&self) -> Option<[QueueState; 2]> {
        match self.server.as_ref()? {
            LateServer::Nobody(parts) => Some(parts.queues.each_ref().map(ActiveQueue::state)),
            LateServer::Kernel(pair) => pair.queues(),
            LateServer::Thread(pair) => Some(pair.queues()),
        }
    }
}

impl Server for Worker<LatePair> {
    fn queues(&self) -> Option<[QueueState; 2]> {
        self.held().and_then(LatePair::queues)
    }
}

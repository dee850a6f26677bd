//! A queue pair that the host's kernel serves: vhost-net moves packets between the rings and the tap
//! in a thread of its own, kicked by the ioeventfd and interrupting by the irqfd. Nothing of it
//! passes through this process, whose part is to start and to stop it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ::vhost::vhost_kern::VhostKernBackend;
use ::vhost::vhost_kern::vhost_binding::{
    VHOST_GET_FEATURES, VHOST_NET_SET_BACKEND, vhost_vring_file,
};
use ::vhost::{Error, VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::QueueT;
use vm_memory::{Address, GuestMemory, GuestMemoryRegion};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

use super::features::MRG_RXBUF;
use super::tap::Tap;
use super::{Parts, Server};
use crate::devices::virtio::ActiveQueue;
use crate::devices::virtio::mmio::{FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, FEATURE_VERSION_1};
use crate::devices::virtio::state::QueueState;
use crate::devices::virtio::worker::Hold;
use crate::memory::GuestMemoryMap;

/// What of the features concerns the rings, which are vhost's; offloads are the tap's.
const RING_FEATURES: u64 =
    FEATURE_VERSION_1 | FEATURE_EVENT_IDX | FEATURE_INDIRECT_DESC | MRG_RXBUF;

/// An open `/dev/vhost-net`, good for one queue pair at a time.
pub(super) struct VhostNet {
    file: File,
    /// It has its thread.
    owned: AtomicBool,
}

impl VhostNet {
    /// # Errors
    ///
    /// When it is none, or the host's kernel is older than virtio 1.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        let mut known = 0u64;
        // SAFETY: it writes the number behind the reference.
        let result = unsafe { ioctl_with_mut_ref(&file, VHOST_GET_FEATURES(), &mut known) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        if known & RING_FEATURES != RING_FEATURES {
            return Err(io::Error::other("the host's kernel is too old for it"));
        }
        Ok(Self { file, owned: AtomicBool::new(false) })
    }
}

/// A queue pair in the kernel's hands.
pub(super) struct VhostPair {
    backend: Backend,
    features: u64,
    /// Receive and transmit, in vhost's order.
    queues: [ActiveQueue; 2],
    running: bool,
}

/// The descriptors, and the memory that the rings lie in.
struct Backend {
    vhost: Arc<VhostNet>,
    tap: Arc<Tap>,
    memory: Arc<GuestMemoryMap>,
}

impl VhostPair {
    pub(super) fn new(vhost: Arc<VhostNet>, parts: Parts) -> Self {
        let Parts { tap, memory, features, queues, .. } = parts;
        let backend = Backend { vhost, tap, memory: Arc::new(memory) };
        Self { backend, features: features & RING_FEATURES, queues, running: false }
    }

    fn start(&mut self) -> Result<(), Error> {
        let Self { backend, features, queues, .. } = self;
        // Not earlier: the thread that is made here keeps the caller's root directory, and in the
        // jail that is the share.
        if !backend.vhost.owned.load(Ordering::Relaxed) {
            backend.set_owner()?;
            backend.vhost.owned.store(true, Ordering::Relaxed);
        }
        backend.set_features(*features)?;
        backend.set_mem_table(&backend.regions())?;
        for (index, active) in queues.iter().enumerate().filter(|(_, active)| !active.dead) {
            if let Err(e) = backend.start_queue(index, active) {
                // The driver is told that the device failed, and may use the memory of the queues
                // before this one for something else.
                for before in 0..index {
                    let _ = backend.set_tap(before, false);
                }
                return Err(e);
            }
        }
        self.running = true;
        Ok(())
    }

    /// Takes the rings back. When it returns, the kernel touches neither them nor guest memory.
    fn stop(&mut self) -> Result<(), Error> {
        self.running = false;
        // Both, before the first failure is looked at: this is what keeps the kernel out.
        let detached = [0, 1].map(|index| match self.queues[index].dead {
            true => Ok(()),
            false => self.backend.set_tap(index, false),
        });
        detached.into_iter().collect::<Result<(), _>>()?;
        for (index, active) in self.queues.iter_mut().enumerate() {
            if active.dead {
                continue;
            }
            let next = self.backend.get_vring_base(index)? as u16;
            active.queue.set_next_avail(next);
            // It has no chain in its hands that is not used, and writes the index itself.
            let used = active.queue.used_idx(&*self.backend.memory, Ordering::Acquire);
            active.queue.set_next_used(used.map_or(next, |used| used.0));
        }
        Ok(())
    }
}

impl Hold for VhostPair {
    fn hold(&mut self) {
        // The descriptors are there, so that it cannot fail.
        if self.running && self.stop().is_err() {
            self.queues.iter_mut().for_each(|queue| queue.dead = true);
        }
    }

    fn resume(&mut self) -> io::Result<()> {
        if self.running {
            return Ok(());
        }
        self.start().map_err(|e| io::Error::other(format!("vhost-net: {e}")))
    }
}

impl Server for VhostPair {
    fn queues(&self) -> Option<[QueueState; 2]> {
        let [receive, transmit] = &self.queues;
        (!self.running).then(|| [receive.state(), transmit.state()])
    }
}

impl Drop for VhostPair {
    fn drop(&mut self) {
        self.hold();
    }
}

impl Backend {
    fn regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        self.memory
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                ..VhostUserMemoryRegionInfo::default()
            })
            .collect()
    }

    /// Gives a queue to the kernel, which serves it from then on.
    fn start_queue(&self, index: usize, active: &ActiveQueue) -> Result<(), Error> {
        let queue = &active.queue;
        self.set_vring_num(index, queue.size())?;
        self.set_vring_base(index, queue.next_avail())?;
        let rings = VringConfigData {
            queue_max_size: queue.max_size(),
            queue_size: queue.size(),
            flags: 0,
            desc_table_addr: queue.desc_table(),
            used_ring_addr: queue.used_ring(),
            avail_ring_addr: queue.avail_ring(),
            log_addr: None,
        };
        self.set_vring_addr(index, &rings)?;
        self.set_vring_kick(index, &active.kick)?;
        self.set_vring_call(index, active.interrupt.line())?;
        self.set_tap(index, true)
    }

    /// Connects a queue to the tap, or takes it away.
    fn set_tap(&self, index: usize, connect: bool) -> Result<(), Error> {
        let fd = if connect { self.tap.as_raw_fd() } else { -1 };
        let file = vhost_vring_file { index: index as u32, fd };
        // SAFETY: it reads the structure behind the reference, and takes a reference of its own to
        // the file that the descriptor names.
        let result = unsafe { ioctl_with_ref(self, VHOST_NET_SET_BACKEND(), &file) };
        if result < 0 { Err(Error::IoctlError(io::Error::last_os_error())) } else { Ok(()) }
    }
}

impl AsRawFd for Backend {
    fn as_raw_fd(&self) -> RawFd {
        self.vhost.file.as_raw_fd()
    }
}

impl VhostKernBackend for Backend {
    type AS = Arc<GuestMemoryMap>;

    fn mem(&self) -> &Self::AS {
        &self.memory
    }
}

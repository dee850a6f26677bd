//! A queue pair that the host's kernel serves.
//!
//! vhost-net moves packets between the rings and the tap in a thread of its own. The ioeventfd
//! kicks that thread, and the thread raises the irqfd. The VMM only starts and stops it.

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
use super::server::{PairServer, QueuePairParts};
use super::tap::Tap;
use crate::devices::virtio::queue::ActiveQueue;
use crate::devices::virtio::reserved_features::{
    FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, FEATURE_VERSION_1,
};
use crate::devices::virtio::state::QueueState;
use crate::devices::virtio::worker::Hold;
use crate::memory::GuestMemoryMap;

/// Features of the rings, which vhost handles. The tap handles the offloads.
const RING_FEATURES: u64 =
    FEATURE_VERSION_1 | FEATURE_EVENT_IDX | FEATURE_INDIRECT_DESC | MRG_RXBUF;

/// An open `/dev/vhost-net`, which serves one queue pair at a time.
pub(super) struct VhostNet {
    file: File,
    /// True once vhost has its thread.
    owned: AtomicBool,
}

impl VhostNet {
    /// Takes the descriptor. Fails if it is not of `/dev/vhost-net`, or the host's kernel lacks
    /// virtio 1.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        let mut known = 0u64;
        // SAFETY: the call writes the number behind the reference.
        let result = unsafe { ioctl_with_mut_ref(&file, VHOST_GET_FEATURES(), &mut known) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        if known & RING_FEATURES != RING_FEATURES {
            return Err(io::Error::other("the host's kernel is too old"));
        }
        Ok(Self { file, owned: AtomicBool::new(false) })
    }
}

/// A queue pair served by vhost-net.
pub(super) struct VhostPair {
    backend: Backend,
    features: u64,
    /// Receive and transmit queue, in vhost's order.
    queues: [ActiveQueue; 2],
    running: bool,
}

/// The descriptors, and the memory with the rings.
struct Backend {
    vhost: Arc<VhostNet>,
    tap: Arc<Tap>,
    memory: Arc<GuestMemoryMap>,
}

impl VhostPair {
    pub(super) fn new(vhost: Arc<VhostNet>, parts: QueuePairParts) -> Self {
        let QueuePairParts { tap, memory, features, queues, .. } = parts;
        let backend = Backend { vhost, tap, memory: Arc::new(memory) };
        Self { backend, features: features & RING_FEATURES, queues, running: false }
    }

    fn start(&mut self) -> Result<(), Error> {
        let Self { backend, features, queues, .. } = self;
        // Not earlier: the new thread keeps the caller's root directory, which is the share in the
        // jail.
        if !backend.vhost.owned.load(Ordering::Relaxed) {
            backend.set_owner()?;
            backend.vhost.owned.store(true, Ordering::Relaxed);
        }
        backend.set_features(*features)?;
        backend.set_mem_table(&backend.regions())?;
        for (index, active) in queues.iter().enumerate().filter(|(_, active)| !active.dead) {
            if let Err(e) = backend.start_queue(index, active) {
                // The driver learns that the device has failed, and may reuse the memory of the
                // queues before this one.
                for before in 0..index {
                    let _ = backend.set_tap(before, false);
                }
                return Err(e);
            }
        }
        self.running = true;
        Ok(())
    }

    /// Takes the rings back. After the return the kernel touches neither them nor guest memory.
    fn stop(&mut self) -> Result<(), Error> {
        self.running = false;
        // Both queues, before any error is returned: detaching keeps the kernel out.
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
            // vhost has no chain that is not used, and writes the index itself.
            let used = active.queue.used_idx(&*self.backend.memory, Ordering::Acquire);
            active.queue.set_next_used(used.map_or(next, |used| used.0));
        }
        Ok(())
    }
}

impl Hold for VhostPair {
    fn hold(&mut self) {
        // The ioctls do not fail on open descriptors.
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

impl PairServer for VhostPair {
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

    /// Passes a queue to the kernel, which serves it from then on.
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

    /// Connects a queue to the tap, or disconnects it.
    fn set_tap(&self, index: usize, connect: bool) -> Result<(), Error> {
        let fd = if connect { self.tap.as_raw_fd() } else { -1 };
        let file = vhost_vring_file { index: index as u32, fd };
        // SAFETY: the call reads the structure behind the reference, and takes its own reference to
        // the file of the descriptor.
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

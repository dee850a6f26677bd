//! File system device (virtio 1.2, 5.11): FUSE requests, served in this process.
//!
//! Several workers take turns at waiting for the queues: one leads, takes a request, lets the next
//! one lead, and serves what it took.
//!
//! ```text
//! service -> request -> dispatch -> open, names, attributes, xattr, data, readdir, lock
//!    |                                 |
//!    `-> waiter (locks of others)      files -> node_table, handle, descriptor -> host
//! ```
//!
//! A file that the guest has looked up is a [`node::Node`]: mount, device and inode, with the name that
//! led to it. A descriptor is opened when it is first needed, and can be closed at any time: the name
//! leads to the file again, or the guest is told that its node is stale and looks the name up itself.
//! Where a mount begins, the guest mounts a file system of its own, with a device number of its own.

mod attributes;
mod credentials;
mod data;
mod descriptor;
mod dispatch;
mod files;
mod handle;
mod high_water;
mod host;
mod idle;
mod init;
mod lock;
mod lock_change;
mod names;
mod node;
mod node_table;
mod open;
mod open_flags;
mod procfs;
mod ranges;
mod readdir;
mod request;
mod service;
mod stat;
mod waiter;
mod xattr;

use std::io;
use std::sync::{Arc, OnceLock};

use nix::sys::resource::{Resource, getrlimit};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::files::Files;
use self::service::Service;
use super::worker::Workers;
use super::{Activation, VirtioDevice, read_from};
use crate::config::FsConfig;
use crate::jail::Antechamber;

const DEVICE_TYPE: u32 = 26;

/// High priority (forgets and interrupts), and requests. A request of 1 MiB has 256 pages beside its
/// headers.
const QUEUE_SIZES: [u16; 2] = [128, 512];

/// Most bytes of a request, or of the answer to it: the data and a page for all else. Descriptors may
/// name the same memory over and over, and some requests are copied whole.
const MAX_MESSAGE_LEN: usize = (init::MAX_PAGES as usize + 1) * init::PAGE_SIZE as usize;

/// Length of the tag in the configuration space.
const TAG_LEN: usize = 36;

/// Descriptors of the process that the guest's files never take: a thousand connections of vsock, and
/// what else it opens. Half of a limit that is smaller than twice of it.
const RESERVED_DESCRIPTORS: u64 = 2048;

/// Most descriptors of the guest's files, each of which keeps an inode in the host's memory.
const MAX_DESCRIPTORS: u64 = 1 << 18;

/// The file system device.
pub struct Fs {
    config_space: [u8; TAG_LEN + 4],
    workers: u8,
    share: Share,
    running: Option<Running>,
}

/// Threads of the device in service.
struct Running {
    /// First, so that no worker begins to wait once all waits have been ended.
    workers: Option<Workers>,
    service: Arc<Service>,
}

impl Fs {
    /// A device for a directory that is opened later, with [`Share::open`].
    ///
    /// # Errors
    ///
    /// When the host gives no descriptor.
    pub fn new(config: &FsConfig) -> io::Result<Self> {
        let mut config_space = [0; TAG_LEN + 4];
        config_space[..config.tag.len()].copy_from_slice(config.tag.as_bytes());
        config_space[TAG_LEN..].copy_from_slice(&1u32.to_le_bytes()); // num_request_queues
        let share = Share {
            config: Arc::new(config.clone()),
            high: Arc::new(EventFd::new(EFD_NONBLOCK)?),
            opened: Arc::default(),
        };
        Ok(Self { config_space, workers: config.workers, share, running: None })
    }

    /// The directory that is shared.
    pub fn share(&self) -> Share {
        self.share.clone()
    }
}

/// The directory that is shared, once it is open.
#[derive(Clone)]
pub struct Share {
    config: Arc<FsConfig>,
    high: Arc<EventFd>,
    opened: Arc<OnceLock<Opened>>,
}

struct Opened {
    files: Files,
    jail: Option<Antechamber>,
}

impl Share {
    /// Opens `root`, which is a path now but never again.
    ///
    /// Workers that serve it need to see `/proc/self/fd`: they stay in `jail`, if there is one.
    ///
    /// # Errors
    ///
    /// When it cannot be opened, or `/proc/self` is not there.
    pub fn open(&self, root: &str, jail: Option<Antechamber>) -> io::Result<()> {
        let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let free = (limit - RESERVED_DESCRIPTORS.min(limit / 2)).min(MAX_DESCRIPTORS);
        self.open_for(root, jail, usize::try_from(free).unwrap_or(usize::MAX))
    }

    /// The same for a guest whose files may take `max_descriptors`.
    pub(super) fn open_for(
        &self,
        root: &str,
        jail: Option<Antechamber>,
        max_descriptors: usize,
    ) -> io::Result<()> {
        let files = Files::open(root, &self.config, max_descriptors, self.high.try_clone()?)?;
        self.opened
            .set(Opened { files, jail })
            .map_err(|_| io::Error::from(io::ErrorKind::AlreadyExists))
    }

    /// Becomes readable when the guest knows of many files, and should be asked to forget some.
    pub fn high_water(&self) -> &EventFd {
        &self.high
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_from(&self.config_space, offset, data);
    }

    fn has_worker(&self, _index: usize) -> bool {
        true
    }

    fn activate(&mut self, active: Activation) -> io::Result<()> {
        let mut workers = Workers::telling(Arc::clone(&active.end))?;
        let service = Arc::new(Service::new(Arc::clone(&self.share.opened), active)?);
        for _ in 0..self.workers {
            let service = Arc::clone(&service);
            workers.spawn("fs", move |stop| service.serve(stop))?;
        }
        let idle = Arc::clone(&service);
        workers.spawn("fs-idle", move |stop| idle.close_idle(stop))?;
        self.running = Some(Running { workers: Some(workers), service });
        Ok(())
    }

    fn reset(&mut self) {
        self.running = None;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.workers.take());
        self.service.end_waits();
    }
}

//! File system device (virtio 1.2, 5.11): FUSE requests, served in this process.
//!
//! Several workers take turns at the queues. The leader takes a request, passes the lead on, and
//! serves the request.
//!
//! ```text
//! service -> request -> dispatch -> open, names, attributes, xattr, data, readdir, lock
//!    |                                 |
//!    `-> waiter (locks of others)      files -> node_table, handle, descriptor -> host
//! ```
//!
//! A file that the guest has looked up is a [`node::Node`]: mount, device and inode, with the name
//! of the lookup. A descriptor is opened when it is needed, and can be closed at any time. If the
//! name leads to another file by then, the guest gets `ESTALE` and looks the name up itself. Where
//! a mount begins, the guest mounts a file system with a device number of its own.

mod attributes;
mod counts;
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
mod lock_table;
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
mod share;
mod stat;
mod waiter;
mod xattr;

use std::io;
use std::sync::Arc;

pub use self::counts::RequestCounts;
use self::service::Service;
pub use self::share::Share;
use super::device::{Activation, VirtioDevice, read_from};
use super::worker::Workers;
use crate::config::FsConfig;

const DEVICE_TYPE: u32 = 26;

/// The high priority queue (forgets and interrupts) and the request queue. A request of 1 MiB has
/// 256 pages beside its headers.
const QUEUE_SIZES: [u16; 2] = [128, 512];

/// Length of the tag in the configuration space.
const TAG_LEN: usize = 36;

/// The file system device.
pub struct Fs {
    config_space: [u8; TAG_LEN + 4],
    workers: u8,
    share: Share,
    running: Option<Running>,
}

/// The threads of a device in service.
struct Running {
    /// Dropped first: no worker may begin a wait once all waits have been ended.
    workers: Option<Workers>,
    service: Arc<Service>,
}

impl Fs {
    /// Creates a device for a directory that [`Share::open`] opens later.
    pub fn new(config: &FsConfig) -> io::Result<Self> {
        let mut config_space = [0; TAG_LEN + 4];
        config_space[..config.tag.len()].copy_from_slice(config.tag.as_bytes());
        config_space[TAG_LEN..].copy_from_slice(&1u32.to_le_bytes()); // num_request_queues
        let share = Share::new(config)?;
        Ok(Self { config_space, workers: config.workers, share, running: None })
    }

    /// Returns a handle of the shared directory.
    pub fn share(&self) -> Share {
        self.share.clone()
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
        let service = Arc::new(Service::new(&self.share, active)?);
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

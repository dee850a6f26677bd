//! File system device (virtio 1.2, 5.11): FUSE requests, served in this process.
//!
//! Several workers take turns at waiting for the queues: one leads, takes a request, lets the next
//! one lead, and serves what it took.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fuse_backend_rs::api::filesystem::FileSystem;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use nix::sched::{CloneFlags, unshare};
use virtio_queue::DescriptorChain;
use vmm_sys_util::eventfd::EventFd;

use super::worker::{Workers, wait_for_work};
use super::{Activation, ActiveQueue, VirtioDevice, read_from};
use crate::config::{FsCache, FsConfig};
use crate::memory::GuestMemoryMap;

const DEVICE_TYPE: u32 = 26;

/// High priority (forgets and interrupts), and requests. A request of 1 MiB has 256 pages beside its
/// headers.
const QUEUE_SIZES: [u16; 2] = [128, 512];

/// Length of the tag in the configuration space.
const TAG_LEN: usize = 36;

/// How long the guest may trust a name or an attribute with [`FsCache::Auto`].
const AUTO_TIMEOUT: Duration = Duration::from_secs(1);

/// The same with [`FsCache::Always`].
const ALWAYS_TIMEOUT: Duration = Duration::from_secs(86_400);

/// The file system device.
pub struct Fs {
    config_space: [u8; TAG_LEN + 4],
    workers: u8,
    server: Arc<Server<Arc<PassthroughFs>>>,
    files: Arc<PassthroughFs>,
    running: Option<Workers>,
}

impl Fs {
    /// A device that will serve the process's root directory as it is when [`Share::open_root`] is
    /// called. Made before the root changes, because it needs `/proc/self/fd`.
    ///
    /// # Errors
    ///
    /// When there is no `/proc`.
    pub fn new(config: &FsConfig) -> io::Result<Self> {
        let (cache_policy, timeout) = match config.cache {
            FsCache::Never => (CachePolicy::Never, Duration::ZERO),
            FsCache::Auto => (CachePolicy::Auto, AUTO_TIMEOUT),
            FsCache::Always => (CachePolicy::Always, ALWAYS_TIMEOUT),
        };
        let files = Arc::new(PassthroughFs::new(Config {
            attr_timeout: timeout,
            entry_timeout: timeout,
            cache_policy,
            root_dir: "/".to_owned(),
            xattr: true,
            do_import: false,
            killpriv_v2: true,
            ..Config::default()
        })?);
        let mut config_space = [0; TAG_LEN + 4];
        config_space[..config.tag.len()].copy_from_slice(config.tag.as_bytes());
        config_space[TAG_LEN..].copy_from_slice(&1u32.to_le_bytes()); // num_request_queues
        Ok(Self {
            config_space,
            workers: config.workers,
            server: Arc::new(Server::new(Arc::clone(&files))),
            files,
            running: None,
        })
    }

    /// The directory that is shared, to open its root when the time has come.
    pub fn share(&self) -> Share {
        Share(Arc::clone(&self.files))
    }
}

/// The directory that is shared.
pub struct Share(Arc<PassthroughFs>);

impl Share {
    /// Takes the process's root directory, as it is now, for the root of the share.
    ///
    /// # Errors
    ///
    /// When it cannot be opened.
    pub fn open_root(&self) -> io::Result<()> {
        self.0.import()
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
        let kicks = active
            .queues
            .iter()
            .map(|queue| queue.kick().try_clone())
            .collect::<io::Result<Vec<_>>>()?;
        let service = Arc::new(Service {
            server: Arc::clone(&self.server),
            memory: active.memory,
            queues: active.queues.into_iter().map(Mutex::new).collect(),
            lead: Mutex::new(()),
            kicks,
        });
        let mut running = Workers::none()?;
        for _ in 0..self.workers {
            let service = Arc::clone(&service);
            running.spawn("fs", move |stop| service.serve(&stop))?;
        }
        self.running = Some(running);
        Ok(())
    }

    fn reset(&mut self) {
        self.running = None;
        // The next driver begins with no open file and no known inode.
        self.files.destroy();
        // The root was opened before, and is still there.
        let _ = self.files.import();
    }
}

/// What the workers have in common.
struct Service {
    server: Arc<Server<Arc<PassthroughFs>>>,
    memory: GuestMemoryMap,
    queues: Vec<Mutex<ActiveQueue>>,
    lead: Mutex<()>,
    kicks: Vec<EventFd>,
}

impl Service {
    fn serve(&self, stop: &EventFd) {
        // The file system changes the working directory for extended attributes of special files.
        if unshare(CloneFlags::CLONE_FS).is_err() {
            return;
        }
        while let Some((index, request)) = self.next_request(stop) {
            let head = request.head_index();
            let written = self.answer(request);
            let mut queue = lock(&self.queues[index]);
            queue.push(&self.memory, head, written);
            queue.signal(&self.memory);
        }
    }

    /// Waits for the turn to lead, then for a request. `None` when it is time to stop.
    fn next_request(&self, stop: &EventFd) -> Option<(usize, DescriptorChain<&GuestMemoryMap>)> {
        let _lead = self.lead.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            for (index, queue) in self.queues.iter().enumerate() {
                if let Some(request) = lock(queue).pop_raw(&self.memory) {
                    return Some((index, request));
                }
            }
            let mut more = false;
            for queue in &self.queues {
                more |= lock(queue).enable_kicks(&self.memory);
            }
            if more {
                continue;
            }
            let mut events = vec![stop];
            events.extend(&self.kicks);
            if !wait_for_work(&events) {
                return None;
            }
        }
    }

    /// Serves one request. Returns how many bytes of answer were written.
    fn answer(&self, request: DescriptorChain<&GuestMemoryMap>) -> u32 {
        let Ok(reader) = Reader::from_descriptor_chain(&self.memory, request.clone()) else {
            return 0;
        };
        let Ok(writer) = VirtioFsWriter::new(&self.memory, request) else { return 0 };
        // What cannot be decoded is given back without an answer.
        let written =
            self.server.handle_message(reader, Writer::VirtioFs(writer), None, None).unwrap_or(0);
        written as u32
    }
}

fn lock(queue: &Mutex<ActiveQueue>) -> MutexGuard<'_, ActiveQueue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

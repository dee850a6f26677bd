//! File system device (virtio 1.2, 5.11): FUSE requests, served in this process.
//!
//! Several workers take turns at waiting for the queues: one leads, takes a request, lets the next
//! one lead, and serves what it took.

mod filter;
mod held;
mod init;
mod readdir;

use std::io::{self, Write as _};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{InHeader, OutHeader};
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use nix::sys::resource::{Resource, getrlimit};
use virtio_queue::DescriptorChain;
use vm_memory::ByteValued as _;
use vmm_sys_util::eventfd::EventFd;

use self::filter::Filter;
use super::worker::{Stop, Workers, wait_for_work};
use super::{Activation, ActiveQueue, VirtioDevice, read_from};
use crate::config::{FsCache, FsConfig};
use crate::jail::{Antechamber, keep_capabilities};
use crate::memory::GuestMemoryMap;
use crate::sync::lock;

const DEVICE_TYPE: u32 = 26;

/// High priority (forgets and interrupts), and requests. A request of 1 MiB has 256 pages beside its
/// headers.
const QUEUE_SIZES: [u16; 2] = [128, 512];

/// Most bytes of a request, or of the answer to it: the data and a page for all else. Descriptors may
/// name the same memory over and over, and some requests are copied whole.
const MAX_MESSAGE_LEN: usize = (init::MAX_PAGES as usize + 1) * init::PAGE_SIZE as usize;

/// Length of the tag in the configuration space.
const TAG_LEN: usize = 36;

/// How long the guest may trust a name or an attribute with [`FsCache::Auto`].
const AUTO_TIMEOUT: Duration = Duration::from_secs(1);

/// The same with [`FsCache::Always`].
const ALWAYS_TIMEOUT: Duration = Duration::from_secs(86_400);

/// Descriptors of the process that the guest's files never take: a thousand connections of vsock, and
/// what else it opens. Half of a limit that is smaller than twice of it.
const RESERVED_DESCRIPTORS: u64 = 2048;

/// The file system device.
pub struct Fs {
    config_space: [u8; TAG_LEN + 4],
    workers: u8,
    share: Share,
    running: Option<Workers>,
}

impl Fs {
    /// A device for a directory that is opened later, with [`Share::open`].
    pub fn new(config: &FsConfig) -> Self {
        let mut config_space = [0; TAG_LEN + 4];
        config_space[..config.tag.len()].copy_from_slice(config.tag.as_bytes());
        config_space[TAG_LEN..].copy_from_slice(&1u32.to_le_bytes()); // num_request_queues
        let share = Share { cache: config.cache, opened: Arc::default() };
        Self { config_space, workers: config.workers, share, running: None }
    }

    /// The directory that is shared.
    pub fn share(&self) -> Share {
        self.share.clone()
    }
}

/// The directory that is shared, once it is open.
#[derive(Clone)]
pub struct Share {
    cache: FsCache,
    opened: Arc<OnceLock<Opened>>,
}

struct Opened {
    files: Arc<Filter>,
    server: Server<Arc<Filter>>,
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
        let free = limit - RESERVED_DESCRIPTORS.min(limit / 2);
        self.open_for(root, jail, usize::try_from(free).unwrap_or(usize::MAX))
    }

    /// The same for a guest whose nodes and handles may take `max_descriptors`.
    pub(super) fn open_for(
        &self,
        root: &str,
        jail: Option<Antechamber>,
        max_descriptors: usize,
    ) -> io::Result<()> {
        let (cache_policy, timeout) = match self.cache {
            FsCache::Never => (CachePolicy::Never, Duration::ZERO),
            FsCache::Auto => (CachePolicy::Auto, AUTO_TIMEOUT),
            FsCache::Always => (CachePolicy::Always, ALWAYS_TIMEOUT),
        };
        let files = PassthroughFs::new(Config {
            attr_timeout: timeout,
            entry_timeout: timeout,
            cache_policy,
            root_dir: root.to_owned(),
            xattr: true,
            // Else it leaves it to a layer above to check names, and gives the guest a write-back
            // cache and files without an open, whatever the policy.
            do_import: true,
            killpriv_v2: true,
            ..Config::default()
        })?;
        files.import()?;
        let files = Arc::new(Filter::new(files, max_descriptors));
        let server = Server::new(Arc::clone(&files));
        self.opened
            .set(Opened { files, server, jail })
            .map_err(|_| io::Error::from(io::ErrorKind::AlreadyExists))
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
            share: Arc::clone(&self.share.opened),
            memory: active.memory,
            queues: active.queues.into_iter().map(Mutex::new).collect(),
            begin: OnceLock::new(),
            lead: Mutex::new(()),
            kicks,
        });
        let mut running = Workers::telling(active.end)?;
        for _ in 0..self.workers {
            let service = Arc::clone(&service);
            running.spawn("fs", move |stop| service.serve(stop))?;
        }
        self.running = Some(running);
        Ok(())
    }

    fn reset(&mut self) {
        self.running = None;
    }
}

/// What the workers have in common.
struct Service {
    share: Arc<OnceLock<Opened>>,
    memory: GuestMemoryMap,
    queues: Vec<Mutex<ActiveQueue>>,
    begin: OnceLock<Result<(), io::ErrorKind>>,
    lead: Mutex<()>,
    kicks: Vec<EventFd>,
}

impl Service {
    fn serve(&self, stop: &Stop) {
        let opened = match self.opened() {
            Ok(opened) => opened,
            Err(e) => return stop.fail(format!("serving the shared directory: {e}")),
        };
        while let Some((index, request)) = self.next_request(stop) {
            let head = request.head_index();
            let written = self.answer(opened, request);
            let mut queue = lock(&self.queues[index]);
            queue.push(&self.memory, head, written);
            queue.signal(&self.memory);
        }
    }

    /// Prepares the calling worker, and with the first one, the share.
    fn opened(&self) -> io::Result<&Opened> {
        let opened = self.share.get().ok_or(io::ErrorKind::NotFound)?;
        if let Some(jail) = &opened.jail {
            jail.stay()?;
        }
        // Without it, and without the right to have it, fewer files can be made.
        let _ = keep_capabilities();
        // A driver begins with no open file and no known inode but the root, whatever the one
        // before it left. Done here, because the root is found by a path that holds in the jail.
        let begun = self.begin.get_or_init(|| opened.files.begin().map_err(|e| e.kind()));
        begun.map_err(io::Error::from)?;
        Ok(opened)
    }

    /// Waits for the turn to lead, then for a request. `None` when it is time to stop.
    fn next_request(&self, stop: &Stop) -> Option<(usize, DescriptorChain<&GuestMemoryMap>)> {
        let _lead = lock(&self.lead);
        while !stop.is_given() {
            for (index, queue) in self.queues.iter().enumerate() {
                if let Some(request) = lock(queue).pop_raw(&self.memory) {
                    return Some((index, request));
                }
            }
            let mut more = false;
            for queue in &self.queues {
                more |= lock(queue).enable_kicks(&self.memory);
            }
            if !more {
                wait_for_work(stop, &self.kicks.iter().collect::<Vec<_>>());
            }
        }
        None
    }

    /// Serves one request. Returns how many bytes of answer were written. What cannot be decoded is
    /// given back without an answer.
    fn answer(&self, opened: &Opened, request: DescriptorChain<&GuestMemoryMap>) -> u32 {
        let Ok(reader) = Reader::from_descriptor_chain(&self.memory, request.clone()) else {
            return 0;
        };
        let Ok(writer) = VirtioFsWriter::new(&self.memory, request) else { return 0 };
        // Looked at here and not before: what the guest has in its descriptors may change.
        if reader.available_bytes() > MAX_MESSAGE_LEN || writer.available_bytes() > MAX_MESSAGE_LEN
        {
            return 0;
        }
        let writer = Writer::VirtioFs(writer);
        let mut rest = reader.clone();
        let Ok(header) = rest.read_obj::<InHeader>() else { return 0 };
        let written = if header.opcode == init::OPCODE {
            reply(writer, &header, init::answer(&opened.files, rest))
        } else if readdir::OPCODES.contains(&header.opcode) {
            let room = writer.available_bytes().saturating_sub(size_of::<OutHeader>());
            reply(writer, &header, readdir::answer(&opened.files, &header, rest, room))
        } else {
            opened.server.handle_message(reader, writer, None, None).map_err(io::Error::other)
        };
        // What has no room for an answer gets none.
        written.unwrap_or(0) as u32
    }
}

/// Writes the answer to the request with `header`. Returns its length.
fn reply(
    mut writer: Writer<'_>,
    header: &InHeader,
    answer: io::Result<Vec<u8>>,
) -> io::Result<usize> {
    let (error, body) = match answer {
        Ok(body) => (0, body),
        Err(e) => (-e.raw_os_error().unwrap_or(libc::EINVAL), Vec::new()),
    };
    let len = size_of::<OutHeader>() + body.len();
    let out = OutHeader { len: len as u32, error, unique: header.unique };
    writer.write_all(out.as_slice())?;
    writer.write_all(&body)?;
    Ok(len)
}

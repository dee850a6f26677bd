//! The shared directory, which is opened in the jail.

use std::io;
use std::sync::{Arc, OnceLock};

use nix::sys::resource::{Resource, getrlimit};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::counts::RequestCounts;
use super::files::Files;
use crate::config::FsConfig;
use crate::jail::OuterRoot;

/// Descriptors of the process that the guest's files never take: for a thousand vsock connections
/// and the VMM's own. If the limit is less than twice this number, half of the limit is reserved.
const RESERVED_DESCRIPTORS: u64 = 2048;

/// Most descriptors of the guest's files. Each keeps an inode in the host's memory.
const MAX_DESCRIPTORS: u64 = 1 << 18;

/// A handle of the shared directory, which may not be open yet.
#[derive(Clone)]
pub struct Share {
    config: Arc<FsConfig>,
    high: Arc<EventFd>,
    opened: Arc<OnceLock<Opened>>,
    requests: Arc<RequestCounts>,
}

pub(super) struct Opened {
    pub(super) files: Files,
    pub(super) jail: Option<OuterRoot>,
}

impl Share {
    /// Creates a handle of a directory that is not open.
    pub(super) fn new(config: &FsConfig) -> io::Result<Self> {
        Ok(Self {
            config: Arc::new(config.clone()),
            high: Arc::new(EventFd::new(EFD_NONBLOCK)?),
            opened: Arc::default(),
            requests: Arc::default(),
        })
    }

    /// Returns the slot of the files, empty until the directory is open.
    pub(super) fn opened(&self) -> Arc<OnceLock<Opened>> {
        Arc::clone(&self.opened)
    }

    /// Returns the counters of the requests, of all drivers since the start.
    pub fn requests(&self) -> &Arc<RequestCounts> {
        &self.requests
    }

    /// Opens the directory at `root`. The path is opened again for each driver that begins.
    ///
    /// Workers that serve it must see `/proc/self/fd`: if there is a `jail`, they stay at its outer
    /// root.
    ///
    /// # Errors
    ///
    /// When the directory cannot be opened, or `/proc/self` does not exist.
    pub fn open(&self, root: &str, jail: Option<OuterRoot>) -> io::Result<()> {
        let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let free = (limit - RESERVED_DESCRIPTORS.min(limit / 2)).min(MAX_DESCRIPTORS);
        self.open_for(root, jail, usize::try_from(free).unwrap_or(usize::MAX))
    }

    /// Opens the directory for a guest whose files may take `max_descriptors`.
    pub(in crate::devices::virtio) fn open_for(
        &self,
        root: &str,
        jail: Option<OuterRoot>,
        max_descriptors: usize,
    ) -> io::Result<()> {
        let files = Files::open(root, &self.config, max_descriptors, self.high.try_clone()?)?;
        self.opened
            .set(Opened { files, jail })
            .map_err(|_| io::Error::from(io::ErrorKind::AlreadyExists))
    }

    /// Returns an eventfd that becomes readable when the guest should forget files.
    pub fn high_water(&self) -> &EventFd {
        &self.high
    }
}

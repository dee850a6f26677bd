//! The files of the share: nodes, found by name, and their descriptors.

use std::ffi::CStr;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{EntryOut, ROOT_ID};
use vmm_sys_util::eventfd::EventFd;

use super::descriptor::{Budget, Descriptor, Slot};
use super::handle::HandleTable;
use super::high_water::HighWater;
use super::host::{ProcSelfFd, component, cwd, error, open_at, open_path};
use super::idle::Idle;
use super::lock_table::Locks;
use super::node::{Mount, Node, Place};
use super::node_table::NodeTable;
use super::procfs;
use super::stat::Stat;
use crate::config::{FsCache, FsConfig};

/// Most directories between a node and the next one with an open descriptor.
const MAX_DEPTH: usize = 400;

/// Number of nodes for each descriptor. Most nodes are only looked up, which takes no descriptor.
const NODES_PER_DESCRIPTOR: usize = 4;

/// Name of a root file system's mount point in a container's directory of the share.
const ROOTFS: &[u8] = b"rootfs";

/// The files of the share, as the guest may use them.
pub(super) struct Files {
    root: std::ffi::CString,
    cache: FsCache,
    /// True if the guest may make block and character devices.
    pub(super) devices: bool,
    pub(super) proc_self_fd: ProcSelfFd,
    pub(super) nodes: NodeTable,
    pub(super) handles: HandleTable,
    pub(super) locks: Locks,
    pub(super) idle: Idle,
    budget: Budget,
    /// Most nodes that the guest may know of at once.
    max_nodes: AtomicUsize,
    high_water: HighWater,
    /// True if the guest mounts a file system of its own where a mount begins.
    submounts: AtomicBool,
}

/// The node behind a name.
pub(super) struct Found {
    pub(super) node: Arc<Node>,
    pub(super) stat: Stat,
    /// True if a mount begins here.
    pub(super) submount: bool,
}

impl Files {
    /// Opens the files below `root`, which may take `max_descriptors`. `high` receives the
    /// request that the guest should forget some.
    pub(super) fn open(
        root: &str,
        config: &FsConfig,
        max_descriptors: usize,
        high: EventFd,
    ) -> io::Result<Self> {
        let root = std::ffi::CString::new(root)?;
        let files = Self {
            root,
            cache: config.cache,
            devices: config.devices,
            proc_self_fd: ProcSelfFd::open()?,
            nodes: NodeTable::default(),
            handles: HandleTable::default(),
            locks: Locks::default(),
            idle: Idle::new()?,
            budget: Budget::new(max_descriptors),
            max_nodes: AtomicUsize::new(usize::MAX),
            high_water: HighWater::new(high),
            submounts: AtomicBool::new(false),
        };
        files.begin(usize::MAX)?;
        Ok(files)
    }

    /// Forgets everything of the guest before, and bounds the nodes of the next one. No other call
    /// may run meanwhile.
    pub(super) fn begin(&self, max_nodes: usize) -> io::Result<()> {
        self.forget_all();
        self.max_nodes.store(max_nodes, Ordering::Relaxed);
        self.budget.lower(max_nodes / NODES_PER_DESCRIPTOR);
        self.submounts.store(false, Ordering::Relaxed);
        let flags = libc::O_PATH | libc::O_DIRECTORY;
        let fd = open_at(cwd(), &self.root, flags, 0)?;
        let root = self.slot()?.hold(fd);
        let stat = Stat::of(root.as_fd())?;
        if stat.links() == 0 && !stat.is_mount_root() {
            return Err(error(libc::ENOENT));
        }
        let mount = Mount::of_share(&root)?;
        let closed = procfs::is_closed(root.as_fd())?;
        let place = Place { parent: ROOT_ID, name: c"".to_owned() };
        self.nodes.begin(Node::new(ROOT_ID, &stat, place, mount, closed, Some(Arc::new(root))));
        Ok(())
    }

    /// Forgets all nodes except the root. Linux does not do so at the end of a mount.
    pub(super) fn forget_all(&self) {
        self.locks.release_all();
        self.handles.take_all();
        self.nodes.forget_all();
    }

    /// Sets if the guest's kernel mounts submounts.
    pub(super) fn set_submounts(&self, agreed: bool) {
        self.submounts.store(agreed, Ordering::Relaxed);
    }

    /// Returns the time for which the guest may cache the name and the attributes of a node.
    pub(super) fn timeout(&self, node: &Node) -> Duration {
        match self.cache {
            FsCache::Auto if node.mount.cached => Duration::from_secs(1),
            FsCache::Always if node.mount.cached => Duration::from_secs(86_400),
            _ => Duration::ZERO,
        }
    }

    /// Returns true if the guest keeps the content of a file that it read before. It compares the
    /// time of the last change before each use.
    pub(super) fn keeps_content(&self, node: &Node) -> bool {
        node.mount.cached && self.cache != FsCache::Never
    }

    /// Takes a slot for one more descriptor. At the bound, idle nodes give up theirs. `ENFILE` if
    /// all belong to open files.
    pub(super) fn slot(&self) -> io::Result<Slot> {
        if let Some(slot) = self.budget.take() {
            return Ok(slot);
        }
        // Requests may still use some of the descriptors, and give them up later.
        loop {
            let given_up = self.nodes.take_files(1 + self.budget.max() / 16);
            let none_left = given_up.is_empty();
            drop(given_up);
            match self.budget.take() {
                Some(slot) => return Ok(slot),
                None if none_left => return Err(error(libc::ENFILE)),
                None => {}
            }
        }
    }

    /// Returns a descriptor of the node, and opens one by the node's name if necessary. `ESTALE` if
    /// the name leads to another file by now, or to none.
    pub(super) fn file(&self, node: &Arc<Node>) -> io::Result<Arc<Descriptor>> {
        if let Some(file) = node.file() {
            return Ok(file);
        }
        // Upwards to a directory that is open, then back down.
        let mut missing = vec![Arc::clone(node)];
        let mut dir = loop {
            let last = missing.last().map_or(ROOT_ID, |node| node.place().parent);
            let parent = self.nodes.find(last).map_err(|_| error(libc::ESTALE))?;
            if let Some(file) = parent.file() {
                break file;
            }
            if missing.len() >= MAX_DEPTH {
                return Err(error(libc::ESTALE));
            }
            missing.push(parent);
        };
        while let Some(node) = missing.pop() {
            let slot = self.slot()?;
            let fd = open_path(dir.as_fd(), &node.place().name).map_err(stale)?;
            if !node.is(&Stat::of(fd.as_fd())?) {
                return Err(error(libc::ESTALE));
            }
            dir = node.keep(slot.hold(fd));
            self.idle.watch(&node);
        }
        Ok(dir)
    }

    /// Returns the attributes of a node, by its name if no descriptor is open. Fails as
    /// [`Files::file`] does.
    pub(super) fn stat(&self, node: &Arc<Node>) -> io::Result<Stat> {
        if let Some(file) = node.file() {
            return Stat::of(file.as_fd());
        }
        let place = node.place();
        let parent = self.nodes.find(place.parent).map_err(|_| error(libc::ESTALE))?;
        let dir = self.file(&parent)?;
        let stat = Stat::of_name(dir.as_fd(), &place.name).map_err(stale)?;
        if node.is(&stat) { Ok(stat) } else { Err(error(libc::ESTALE)) }
    }

    /// Refuses a file without a name (`ESTALE`), so that the guest looks its name up again. A
    /// file that the guest has open is allowed.
    pub(super) fn refuse_gone(&self, node: &Node, stat: &Stat) -> io::Result<()> {
        let gone = stat.links() == 0 && !node.is_mount_root && !node.has_handles();
        // A directory may be the working directory of a process, which needs no open file. Names on
        // a mount that is not cached were just looked up.
        if gone && (node.mount.cached || !node.is_dir()) {
            Err(error(libc::ESTALE))
        } else {
            Ok(())
        }
    }

    /// Converts an error from a removed directory to `ESTALE`.
    pub(super) fn gone_or(&self, dir: &Node, file: &Descriptor, e: io::Error) -> io::Error {
        let gone = e.raw_os_error() == Some(libc::ENOENT)
            && !dir.has_handles()
            && !dir.is_mount_root
            && Stat::of(file.as_fd()).is_ok_and(|stat| stat.links() == 0);
        if gone { error(libc::ESTALE) } else { e }
    }

    /// Looks `name` up in the node `parent`, and counts the lookup. `ENFILE` if the guest knows of
    /// too many files.
    pub(super) fn lookup(&self, parent: u64, name: &CStr) -> io::Result<Found> {
        let name = component(name)?;
        let dir = self.nodes.find(parent)?;
        self.lookup_in(&dir, name)
    }

    /// Looks `name` up in `dir`, and counts the lookup.
    pub(super) fn lookup_in(&self, dir: &Arc<Node>, name: &CStr) -> io::Result<Found> {
        let file = self.file(dir)?;
        let stat = Stat::of_name(file.as_fd(), name).map_err(|e| self.gone_or(dir, &file, e))?;
        if let Some(node) = self.nodes.look_up(&stat) {
            node.found_at(dir.id, name, &stat);
            let submount = self.begins_mount(dir, &stat);
            return Ok(Found { node, stat, submount });
        }
        self.meet(dir, &file, name, &stat)
    }

    /// Adds a node for `name` in `dir`. The directory's descriptor is `file`.
    fn meet(
        &self,
        dir: &Arc<Node>,
        file: &Descriptor,
        name: &CStr,
        stat: &Stat,
    ) -> io::Result<Found> {
        let place = || Place { parent: dir.id, name: name.to_owned() };
        if stat.identity().mount == dir.identity.mount {
            let traced = dir.traces(name.to_bytes());
            let id = self.nodes.new_id();
            let node = Node::new(id, stat, place(), dir.mount, traced, None);
            return self.found(dir, node, *stat);
        }
        // Only a descriptor shows the root of the mount on the name.
        let fd = open_path(file.as_fd(), name)?;
        let stat = Stat::of(fd.as_fd())?;
        let root = self.slot()?.hold(fd);
        let rootfs = name.to_bytes() == ROOTFS
            && dir.mount.level == 0
            && dir.place().parent == ROOT_ID
            && dir.id != ROOT_ID;
        let mount = dir.mount.below(&root, rootfs)?;
        let closed = procfs::is_closed(root.as_fd())?;
        let id = self.nodes.new_id();
        let root = Some(Arc::new(root));
        let found = self.found(dir, Node::new(id, &stat, place(), mount, closed, root), stat)?;
        self.idle.watch(&found.node);
        Ok(found)
    }

    fn found(&self, dir: &Node, node: Node, stat: Stat) -> io::Result<Found> {
        let max = self.max_nodes.load(Ordering::Relaxed);
        let node = self.nodes.add(node, &stat, max)?;
        self.high_water.check(self.nodes.len(), max);
        Ok(Found { node, stat, submount: self.begins_mount(dir, &stat) })
    }

    /// Adds a node for a file that was just made in `dir` and is open.
    pub(super) fn made(
        &self,
        dir: &Arc<Node>,
        name: &CStr,
        made: &Descriptor,
    ) -> io::Result<Found> {
        let stat = Stat::of(made.as_fd())?;
        if let Some(node) = self.nodes.look_up(&stat) {
            node.found_at(dir.id, name, &stat);
            return Ok(Found { node, stat, submount: false });
        }
        let place = Place { parent: dir.id, name: name.to_owned() };
        let traced = dir.traces(name.to_bytes());
        let node = Node::new(self.nodes.new_id(), &stat, place, dir.mount, traced, None);
        self.found(dir, node, stat)
    }

    /// Returns true for a directory of another mount than its parent's.
    pub(super) fn begins_mount(&self, dir: &Node, stat: &Stat) -> bool {
        self.submounts.load(Ordering::Relaxed)
            && stat.kind() == libc::S_IFDIR
            && stat.identity().mount != dir.identity.mount
    }

    /// Converts a found node to FUSE's entry.
    pub(super) fn entry_out(&self, found: &Found) -> EntryOut {
        let timeout = self.timeout(&found.node);
        EntryOut {
            nodeid: found.node.id,
            generation: 0,
            entry_valid: timeout.as_secs(),
            attr_valid: timeout.as_secs(),
            entry_valid_nsec: timeout.subsec_nanos(),
            attr_valid_nsec: timeout.subsec_nanos(),
            attr: found.stat.attr(found.submount),
        }
    }

    /// Opens a descriptor of the node before its name goes. The guest can still ask for the
    /// attributes of a file that it knows.
    pub(super) fn pin(&self, dir: &Descriptor, name: &CStr) {
        let Ok(stat) = Stat::of_name(dir.as_fd(), name) else { return };
        if stat.kind() != libc::S_IFDIR && stat.links() > 1 {
            return;
        }
        let Some(node) = self.nodes.of(&stat) else { return };
        if node.file().is_some() {
            return;
        }
        // Without a descriptor the guest gets `ESTALE`.
        let Ok(slot) = self.slot() else { return };
        if let Ok(fd) = open_path(dir.as_fd(), name)
            && Stat::of(fd.as_fd()).is_ok_and(|stat| node.is(&stat))
        {
            node.keep(slot.hold(fd));
            self.idle.watch(&node);
        }
    }

    /// Notes that the guest has renamed a file to `name` in `dir`.
    pub(super) fn moved(&self, dir: &Node, file: &Descriptor, name: &CStr) {
        if let Ok(stat) = Stat::of_name(file.as_fd(), name)
            && let Some(node) = self.nodes.of(&stat)
        {
            node.found_at(dir.id, name, &stat);
        }
    }
}

/// Converts the error of a name that led to a file, and leads nowhere now.
pub(super) fn stale(e: io::Error) -> io::Error {
    match e.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => error(libc::ESTALE),
        _ => e,
    }
}

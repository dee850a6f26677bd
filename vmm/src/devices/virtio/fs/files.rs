//! The share's files: nodes found by name, and the descriptors that stand for them.

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
use super::lock::Locks;
use super::node::{Mount, Node, Place};
use super::node_table::NodeTable;
use super::procfs;
use super::stat::Stat;
use crate::config::{FsCache, FsConfig};

/// Directories between a node and the nearest one with an open descriptor.
const MAX_DEPTH: usize = 400;

/// Most nodes are looked at only, which takes no descriptor.
const NODES_PER_DESCRIPTOR: usize = 4;

/// Directory of the share, beside each container's others, where its root file system is mounted.
const ROOTFS: &[u8] = b"rootfs";

/// The share's files, as the guest may use them.
pub(super) struct Files {
    root: std::ffi::CString,
    cache: FsCache,
    /// Block and character devices may be made.
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
    /// The guest mounts a directory of its own where a mount begins.
    submounts: AtomicBool,
}

/// A node that a name was found to lead to.
pub(super) struct Found {
    pub(super) node: Arc<Node>,
    pub(super) stat: Stat,
    /// A mount begins here.
    pub(super) submount: bool,
}

impl Files {
    /// The files below `root`, for a guest whose files may take `max_descriptors`. `high` is told when
    /// the guest should forget some.
    ///
    /// # Errors
    ///
    /// When `root` cannot be opened, or `/proc/self` is not there.
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

    /// Forgets all that a guest had, and bounds the nodes of the next one. Nothing else may be asked
    /// meanwhile.
    ///
    /// # Errors
    ///
    /// When the share cannot be opened again.
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

    /// The guest forgets all but the root, which it does not do by itself at the end of a mount.
    pub(super) fn forget_all(&self) {
        self.locks.release_all();
        self.handles.take_all();
        self.nodes.forget_all();
    }

    /// What the guest's kernel can do has been settled.
    pub(super) fn set_submounts(&self, agreed: bool) {
        self.submounts.store(agreed, Ordering::Relaxed);
    }

    /// How long the guest may trust the name and the attributes of a node.
    pub(super) fn timeout(&self, node: &Node) -> Duration {
        match self.cache {
            FsCache::Auto if node.mount.cached => Duration::from_secs(1),
            FsCache::Always if node.mount.cached => Duration::from_secs(86_400),
            _ => Duration::ZERO,
        }
    }

    /// The guest keeps the content of a file that it read before. It looks at the time of the last
    /// change all the same, before it uses it.
    pub(super) fn keeps_content(&self, node: &Node) -> bool {
        node.mount.cached && self.cache != FsCache::Never
    }

    /// Room for one descriptor more. At the bound, idle nodes give theirs up.
    ///
    /// # Errors
    ///
    /// `ENFILE` when all are of open files.
    pub(super) fn slot(&self) -> io::Result<Slot> {
        if let Some(slot) = self.budget.take() {
            return Ok(slot);
        }
        // Some of them may be in use by requests, which give them up later.
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

    /// A descriptor of the node, which is opened again by its name if need be.
    ///
    /// # Errors
    ///
    /// `ESTALE` when that name leads to another file by now, or to none.
    pub(super) fn file(&self, node: &Arc<Node>) -> io::Result<Arc<Descriptor>> {
        if let Some(file) = node.file() {
            return Ok(file);
        }
        // From here upwards to a directory that is open, then back down.
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

    /// The attributes of a node, without a descriptor if there is none.
    ///
    /// # Errors
    ///
    /// As [`Files::file`].
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

    /// Refuses to use a file that has no name any more, unless the guest has it open: it is to look
    /// the name up again.
    ///
    /// # Errors
    ///
    /// `ESTALE`.
    pub(super) fn refuse_gone(&self, node: &Node, stat: &Stat) -> io::Result<()> {
        let gone = stat.links() == 0 && !node.is_mount_root && !node.has_handles();
        // A process may have its working directory there, which needs no open file. Names on a mount
        // that is not cached have just been looked up.
        if gone && (node.mount.cached || !node.is_dir()) {
            Err(error(libc::ESTALE))
        } else {
            Ok(())
        }
    }

    /// Makes `ESTALE` of an error that comes from a directory that is gone.
    pub(super) fn gone_or(&self, dir: &Node, file: &Descriptor, e: io::Error) -> io::Error {
        let gone = e.raw_os_error() == Some(libc::ENOENT)
            && !dir.has_handles()
            && !dir.is_mount_root
            && Stat::of(file.as_fd()).is_ok_and(|stat| stat.links() == 0);
        if gone { error(libc::ESTALE) } else { e }
    }

    /// Looks `name` up in the node `parent`, which the guest is told of.
    ///
    /// # Errors
    ///
    /// What the host says, and `ENFILE` when the guest knows of too many files.
    pub(super) fn lookup(&self, parent: u64, name: &CStr) -> io::Result<Found> {
        let name = component(name)?;
        let dir = self.nodes.find(parent)?;
        self.lookup_in(&dir, name)
    }

    /// The same with a node at hand.
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

    /// Adds a node for a file that was just made or found in `dir`, whose descriptor is `file`.
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
        // What is mounted there can be told only with a descriptor of it.
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

    /// A directory of another mount than the one that it lies in.
    pub(super) fn begins_mount(&self, dir: &Node, stat: &Stat) -> bool {
        self.submounts.load(Ordering::Relaxed)
            && stat.kind() == libc::S_IFDIR
            && stat.identity().mount != dir.identity.mount
    }

    /// The entry as FUSE has it.
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

    /// Opens the node's descriptor before its name goes, so that the guest can still ask for the
    /// attributes of what it knows.
    pub(super) fn pin(&self, dir: &Descriptor, name: &CStr) {
        let Ok(stat) = Stat::of_name(dir.as_fd(), name) else { return };
        if stat.kind() != libc::S_IFDIR && stat.links() > 1 {
            return;
        }
        let Some(node) = self.nodes.of(&stat) else { return };
        if node.file().is_some() {
            return;
        }
        // Without it the guest is told that the node is stale.
        let Ok(slot) = self.slot() else { return };
        if let Ok(fd) = open_path(dir.as_fd(), name)
            && Stat::of(fd.as_fd()).is_ok_and(|stat| node.is(&stat))
        {
            node.keep(slot.hold(fd));
            self.idle.watch(&node);
        }
    }

    /// A file of the guest's has been renamed to `name` in `dir`.
    pub(super) fn moved(&self, dir: &Node, file: &Descriptor, name: &CStr) {
        if let Ok(stat) = Stat::of_name(file.as_fd(), name)
            && let Some(node) = self.nodes.of(&stat)
        {
            node.found_at(dir.id, name, &stat);
        }
    }
}

/// A name that led to a file leads nowhere now.
pub(super) fn stale(e: io::Error) -> io::Error {
    match e.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => error(libc::ESTALE),
        _ => e,
    }
}

//! Nodes: the files that the guest knows of.

use std::ffi::CString;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::descriptor::Descriptor;
use super::host::{error, file_system};
use super::procfs;
use super::stat::{Birth, Identity, Stat};
use crate::sync::lock;

/// File systems that need special treatment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileSystemKind {
    /// procfs, where some files are other processes' memory.
    Proc,
    /// overlayfs, whose listings may have other inode numbers than its attributes.
    Overlay,
    Other,
}

/// Properties of all files of a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mount {
    /// Number of mounts between the share's own mount and this one.
    pub(super) level: u32,
    /// True for a root file system, which only the guest is expected to write.
    pub(super) cached: bool,
    pub(super) file_system: FileSystemKind,
}

impl Mount {
    /// Returns the properties of the share's own mount.
    pub(super) fn of_share(root: &Descriptor) -> io::Result<Self> {
        Ok(Self { level: 0, cached: false, file_system: kind_of(root)? })
    }

    /// Returns the properties of a mount below this one, whose root is `root`.
    pub(super) fn below(&self, root: &Descriptor, rootfs: bool) -> io::Result<Self> {
        Ok(Self { level: self.level + 1, cached: rootfs, file_system: kind_of(root)? })
    }

    /// Returns true if the host may have made the mount and may remove it. Such a mount lies below
    /// one that the sandbox process has made.
    pub(super) fn is_host_owned(&self) -> bool {
        self.level > 1
    }
}

fn kind_of(root: &Descriptor) -> io::Result<FileSystemKind> {
    Ok(match file_system(root.as_fd())? {
        libc::PROC_SUPER_MAGIC => FileSystemKind::Proc,
        libc::OVERLAYFS_SUPER_MAGIC => FileSystemKind::Overlay,
        _ => FileSystemKind::Other,
    })
}

/// A file that the guest knows of.
///
/// While no handle is open, the descriptor may be closed at any time. It is opened again by the
/// name of the last lookup.
pub(super) struct Node {
    /// The guest's number of the node, never used for another file.
    pub(super) id: u64,
    pub(super) identity: Identity,
    /// Type of the file (`S_IFMT`).
    pub(super) kind: u32,
    pub(super) mount: Mount,
    /// True if the file is the root of a mount.
    pub(super) is_mount_root: bool,
    /// True if the file shows the memory or the files of another process.
    pub(super) is_traced: bool,
    handles: AtomicU32,
    recent: AtomicBool,
    watched: AtomicBool,
    state: Mutex<NodeState>,
}

/// The changing parts of a node: descriptor and name.
struct NodeState {
    file: Option<Arc<Descriptor>>,
    parent: u64,
    name: CString,
    birth: Birth,
}

/// A name in the directory with this node number.
pub(super) struct Place {
    pub(super) parent: u64,
    pub(super) name: CString,
}

impl Node {
    pub(super) fn new(
        id: u64,
        stat: &Stat,
        place: Place,
        mount: Mount,
        is_traced: bool,
        file: Option<Arc<Descriptor>>,
    ) -> Self {
        Self {
            id,
            identity: stat.identity(),
            kind: stat.kind(),
            mount,
            is_mount_root: stat.is_mount_root(),
            is_traced,
            handles: AtomicU32::new(0),
            recent: AtomicBool::new(true),
            watched: AtomicBool::new(false),
            state: Mutex::new(NodeState {
                file,
                parent: place.parent,
                name: place.name,
                birth: stat.birth(),
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, NodeState> {
        lock(&self.state)
    }

    pub(super) fn is_dir(&self) -> bool {
        self.kind == libc::S_IFDIR
    }

    /// Refuses a file that shows another process's memory or files (`EACCES`).
    pub(super) fn refuse_traced(&self) -> io::Result<()> {
        if self.is_traced { Err(error(libc::EACCES)) } else { Ok(()) }
    }

    /// Returns true if a file of this name in this directory is closed to the guest.
    pub(super) fn traces(&self, name: &[u8]) -> bool {
        self.mount.file_system == FileSystemKind::Proc
            && (self.is_traced || procfs::needs_ptrace(name))
    }

    /// Returns the descriptor, if it is open.
    pub(super) fn file(&self) -> Option<Arc<Descriptor>> {
        self.recent.store(true, Ordering::Relaxed);
        self.state().file.clone()
    }

    /// Returns true if the descriptor is open. The call does not count as a use.
    pub(super) fn holds_file(&self) -> bool {
        self.state().file.is_some()
    }

    /// Keeps `file`, unless a descriptor is open already. Returns the open descriptor.
    pub(super) fn keep(&self, file: Descriptor) -> Arc<Descriptor> {
        Arc::clone(self.state().file.get_or_insert_with(|| Arc::new(file)))
    }

    /// Keeps the descriptor of a handle, until [`Node::part_with`].
    pub(super) fn share(&self, file: &Arc<Descriptor>) {
        self.state().file.get_or_insert_with(|| Arc::clone(file));
    }

    /// Returns true if `file` is the node's descriptor and another handle is open too.
    pub(super) fn lends(&self, file: &Arc<Descriptor>) -> bool {
        self.handles.load(Ordering::Relaxed) > 1
            && self.state().file.as_ref().is_some_and(|own| Arc::ptr_eq(own, file))
    }

    /// Replaces the descriptor by `other`, if it is `file`.
    pub(super) fn part_with(&self, file: &Arc<Descriptor>, other: Option<Descriptor>) {
        let mut state = self.state();
        if state.file.as_ref().is_some_and(|own| Arc::ptr_eq(own, file)) {
            state.file = other.map(Arc::new);
        }
    }

    /// Takes the descriptor, if no handle is open. With `idle`, only one that was not used since
    /// the last call.
    pub(super) fn take_file(&self, idle: bool) -> Option<Arc<Descriptor>> {
        let mut state = self.state();
        if state.file.is_none() || self.has_handles() {
            return None;
        }
        let recent = self.recent.swap(false, Ordering::Relaxed);
        if idle && recent { None } else { state.file.take() }
    }

    pub(super) fn place(&self) -> Place {
        let state = self.state();
        Place { parent: state.parent, name: state.name.clone() }
    }

    /// Returns true if `stat` is of this file.
    ///
    /// An inode number stays the file's own while the file is held open. Otherwise the time of
    /// birth decides. Two kinds are exempt. An overlay changes the time of birth when it copies a
    /// file up. For a directory it does not matter, as each name in it is looked up by itself. The
    /// guest would also unmount everything below a directory that became another.
    pub(super) fn is(&self, stat: &Stat) -> bool {
        if self.kind != stat.kind() || self.identity != stat.identity() {
            return false;
        }
        if self.is_dir() || self.mount.file_system == FileSystemKind::Overlay {
            return true;
        }
        let state = self.state();
        match (state.birth, stat.birth()) {
            (Some(known), Some(seen)) => {
                known == seen || state.file.is_some() || self.has_handles()
            }
            _ => true,
        }
    }

    /// Notes the place at which the file was found, and its time of birth.
    pub(super) fn found_at(&self, parent: u64, name: &std::ffi::CStr, stat: &Stat) {
        let mut state = self.state();
        state.birth = stat.birth();
        state.parent = parent;
        if state.name.as_c_str() != name {
            state.name = name.to_owned();
        }
    }

    /// Sets if the idle descriptor is watched. Returns the value before.
    pub(super) fn set_watched(&self, watched: bool) -> bool {
        self.watched.swap(watched, Ordering::AcqRel)
    }

    pub(super) fn add_handle(&self) {
        self.handles.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn remove_handle(&self) {
        self.handles.fetch_sub(1, Ordering::Relaxed);
    }

    pub(super) fn has_handles(&self) -> bool {
        self.handles.load(Ordering::Relaxed) != 0
    }
}

//! What the guest holds of the share: nodes and handles, each of which costs a descriptor.
//!
//! The counts here never exceed the crate's: what is taken is added there first, and what is given
//! back is taken off here first. So a guest cannot give back what it was not told of.

use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, MutexGuard};

use crate::sync::lock;

/// Most files that are told apart between two resets: the crate remembers the node of each that was
/// ever looked up, in some 50 bytes. With `use_host_ino` it would not, but count mounts instead, also
/// those long gone, and serve no file of the 255th.
const MAX_FILES: u64 = 1 << 23;

/// A handle of the crate's, and the flags that it has for it.
pub(super) type Opened = (u64, u32);

/// A handle that the guest has.
#[derive(Clone, Copy)]
pub(super) struct Handle {
    pub(super) node: u64,
    /// What the crate was given at the open, bit by bit.
    pub(super) flags: u32,
    /// The same file with the other `O_APPEND`.
    pub(super) twin: Option<Opened>,
}

/// Nodes and handles that the guest has.
pub(super) struct Held {
    max_descriptors: usize,
    tables: Mutex<Tables>,
}

#[derive(Default)]
struct Tables {
    /// How often each node was looked up.
    nodes: HashMap<u64, u64>,
    handles: HashMap<u64, Handle>,
    twins: usize,
    /// The crate counts nodes up: the largest, and the largest before the last reset.
    last_node: u64,
    first_node: u64,
}

/// All that the guest had.
pub(super) struct Remains {
    pub(super) nodes: HashMap<u64, u64>,
    pub(super) handles: HashMap<u64, Handle>,
}

impl Held {
    pub(super) fn new(max_descriptors: usize) -> Self {
        Self { max_descriptors, tables: Mutex::default() }
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        lock(&self.tables)
    }

    /// Whether the guest may have one more of anything.
    ///
    /// # Errors
    ///
    /// `ENFILE`.
    pub(super) fn room(&self) -> io::Result<()> {
        let tables = self.tables();
        let descriptors = tables.nodes.len() + tables.handles.len() + tables.twins;
        if descriptors >= self.max_descriptors || tables.files() >= MAX_FILES {
            return Err(io::Error::from_raw_os_error(libc::ENFILE));
        }
        Ok(())
    }

    /// Whether the crate may look up files that it did not know.
    ///
    /// # Errors
    ///
    /// `ENFILE`.
    pub(super) fn room_for_files(&self) -> io::Result<()> {
        if self.tables().files() >= MAX_FILES {
            return Err(io::Error::from_raw_os_error(libc::ENFILE));
        }
        Ok(())
    }

    /// The crate has given this node out, to be told or not.
    pub(super) fn saw_node(&self, node: u64) {
        let mut tables = self.tables();
        tables.last_node = tables.last_node.max(node);
    }

    /// The guest is told of this node once more.
    pub(super) fn add_node(&self, node: u64) {
        let mut tables = self.tables();
        tables.last_node = tables.last_node.max(node);
        let lookups = tables.nodes.entry(node).or_default();
        *lookups = lookups.saturating_add(1);
    }

    /// Takes lookups of a node back. Returns how many of `count` there were.
    pub(super) fn take_node(&self, node: u64, count: u64) -> u64 {
        let mut tables = self.tables();
        let Some(lookups) = tables.nodes.get_mut(&node) else { return 0 };
        let taken = count.min(*lookups);
        *lookups -= taken;
        if *lookups == 0 {
            tables.nodes.remove(&node);
        }
        taken
    }

    pub(super) fn add_handle(&self, handle: u64, node: u64, flags: u32) {
        self.tables().handles.insert(handle, Handle { node, flags, twin: None });
    }

    /// The handle, which has to be one of `node`.
    pub(super) fn handle(&self, handle: u64, node: u64) -> io::Result<Handle> {
        let tables = self.tables();
        let held = tables.handles.get(&handle).filter(|held| held.node == node);
        held.copied().ok_or_else(no_handle)
    }

    /// Gives the handle a twin if it has none. Returns the twin that it has now, or `None` when the
    /// handle is gone.
    pub(super) fn add_twin(&self, handle: u64, twin: Opened) -> Option<Opened> {
        let mut tables = self.tables();
        let held = tables.handles.get_mut(&handle)?;
        let had = held.twin;
        let has = *held.twin.get_or_insert(twin);
        tables.twins += usize::from(had.is_none());
        Some(has)
    }

    /// Takes the handle back, which has to be one of `node`.
    pub(super) fn take_handle(&self, handle: u64, node: u64) -> io::Result<Handle> {
        let mut tables = self.tables();
        let held = tables.handles.get(&handle).filter(|held| held.node == node);
        let held = held.copied().ok_or_else(no_handle)?;
        tables.handles.remove(&handle);
        tables.twins -= usize::from(held.twin.is_some());
        Ok(held)
    }

    /// Takes back all that the guest has.
    pub(super) fn take_all(&self) -> Remains {
        let mut tables = self.tables();
        tables.twins = 0;
        let nodes = std::mem::take(&mut tables.nodes);
        Remains { nodes, handles: std::mem::take(&mut tables.handles) }
    }

    /// The crate has forgotten all files.
    pub(super) fn forgot_files(&self) {
        let mut tables = self.tables();
        tables.first_node = tables.last_node;
    }
}

impl Tables {
    fn files(&self) -> u64 {
        self.last_node - self.first_node
    }
}

fn no_handle() -> io::Error {
    io::Error::from_raw_os_error(libc::EBADF)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_were_ever_seen_are_bounded() {
        let held = Held::new(10);
        held.add_node(2);
        assert_eq!(held.take_node(2, 1), 1);
        held.saw_node(MAX_FILES - 1);
        assert!(held.room().is_ok() && held.room_for_files().is_ok());
        held.saw_node(MAX_FILES);
        let enfile = Some(libc::ENFILE);
        assert_eq!(held.room().unwrap_err().raw_os_error(), enfile);
        assert_eq!(held.room_for_files().unwrap_err().raw_os_error(), enfile);
        held.forgot_files();
        assert!(held.room().is_ok());
    }
}

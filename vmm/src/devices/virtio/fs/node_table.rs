//! Table of the nodes that the guest has looked up and not yet forgotten.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use fuse_backend_rs::abi::fuse_abi::ROOT_ID;

use super::descriptor::Descriptor;
use super::host::error;
use super::node::Node;
use super::stat::{Identity, Stat};
use crate::sync::lock;

/// The nodes, by number and by file.
#[derive(Default)]
pub(super) struct NodeTable {
    tables: Mutex<Tables>,
    last_id: AtomicU64,
}

#[derive(Default)]
struct Tables {
    nodes: HashMap<u64, Known>,
    ids: HashMap<Identity, u64>,
}

struct Known {
    node: Arc<Node>,
    /// Number of lookups that the guest has not taken back.
    lookups: u64,
}

impl NodeTable {
    fn tables(&self) -> MutexGuard<'_, Tables> {
        lock(&self.tables)
    }

    /// Returns a number that no node has had. It is larger than the root's.
    pub(super) fn new_id(&self) -> u64 {
        ROOT_ID + 1 + self.last_id.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn len(&self) -> usize {
        self.tables().nodes.len()
    }

    /// Returns the node with this number (`EBADF`).
    pub(super) fn find(&self, id: u64) -> io::Result<Arc<Node>> {
        let tables = self.tables();
        tables.nodes.get(&id).map(|known| Arc::clone(&known.node)).ok_or_else(no_node)
    }

    /// Returns the node of a file, if the guest knows of it.
    pub(super) fn of(&self, stat: &Stat) -> Option<Arc<Node>> {
        let tables = self.tables();
        let node = &tables.nodes.get(tables.ids.get(&stat.identity())?)?.node;
        node.is(stat).then(|| Arc::clone(node))
    }

    /// Returns the node of a file, and counts one more lookup. `None` if the guest does not know of
    /// it.
    pub(super) fn look_up(&self, stat: &Stat) -> Option<Arc<Node>> {
        let mut tables = self.tables();
        let id = *tables.ids.get(&stat.identity())?;
        let known = tables.nodes.get_mut(&id)?;
        if !known.node.is(stat) {
            return None;
        }
        known.lookups = known.lookups.saturating_add(1);
        Some(Arc::clone(&known.node))
    }

    /// Adds a node with one lookup. If another worker has added one for the same file, counts a
    /// lookup of that node and returns it. `ENFILE` if there are `max` nodes already.
    pub(super) fn add(&self, node: Node, stat: &Stat, max: usize) -> io::Result<Arc<Node>> {
        let mut tables = self.tables();
        let Tables { nodes, ids } = &mut *tables;
        if let Some(known) = ids.get(&node.identity).and_then(|id| nodes.get_mut(id))
            && known.node.is(stat)
        {
            known.lookups = known.lookups.saturating_add(1);
            return Ok(Arc::clone(&known.node));
        }
        if nodes.len() >= max {
            return Err(error(libc::ENFILE));
        }
        let node = Arc::new(node);
        // A removed file keeps its node's number, but its inode's number may belong to another
        // node.
        ids.insert(node.identity, node.id);
        nodes.insert(node.id, Known { node: Arc::clone(&node), lookups: 1 });
        Ok(node)
    }

    /// Takes lookups of a node back, and drops a node without any. The root stays.
    pub(super) fn forget(&self, id: u64, count: u64) {
        if id == ROOT_ID {
            return;
        }
        let mut tables = self.tables();
        let Some(known) = tables.nodes.get_mut(&id) else { return };
        known.lookups = known.lookups.saturating_sub(count);
        if known.lookups > 0 {
            return;
        }
        let gone = tables.nodes.remove(&id);
        if let Some(Known { node, .. }) = &gone
            && tables.ids.get(&node.identity) == Some(&id)
        {
            tables.ids.remove(&node.identity);
        }
        // The descriptor is closed after the table is unlocked, because the host's file system may
        // take long.
        drop(tables);
        drop(gone);
    }

    /// Drops all nodes but the root.
    pub(super) fn forget_all(&self) {
        let mut tables = self.tables();
        let mut gone = std::mem::take(&mut *tables);
        if let Some(root) = gone.nodes.remove(&ROOT_ID) {
            tables.ids.insert(root.node.identity, ROOT_ID);
            tables.nodes.insert(ROOT_ID, root);
        }
        drop(tables);
        drop(gone);
    }

    /// Drops all nodes, and begins with the root `root`.
    pub(super) fn begin(&self, root: Node) {
        let mut tables = self.tables();
        let gone = std::mem::take(&mut *tables);
        tables.ids.insert(root.identity, ROOT_ID);
        tables.nodes.insert(ROOT_ID, Known { node: Arc::new(root), lookups: 1 });
        drop(tables);
        drop(gone);
    }

    /// Takes up to `count` descriptors of nodes without open handles. Idle ones go first.
    pub(super) fn take_files(&self, count: usize) -> Vec<Arc<Descriptor>> {
        let tables = self.tables();
        let mut taken = Vec::new();
        for idle in [true, false] {
            let others = tables.nodes.values().filter(|known| known.node.id != ROOT_ID);
            let files = others.filter_map(|known| known.node.take_file(idle));
            taken.extend(files.take(count - taken.len()));
            if !taken.is_empty() {
                break;
            }
        }
        taken
    }
}

fn no_node() -> io::Error {
    error(libc::EBADF)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::super::node::{FileSystemKind, Mount, Place};
    use super::*;

    #[test]
    fn nodes_are_bounded_and_one_that_is_forgotten_makes_room() {
        const MOUNT: Mount = Mount { level: 0, cached: false, file_system: FileSystemKind::Other };
        let table = NodeTable::default();
        let files = [(); 3].map(|()| tempfile::tempfile().unwrap());
        let stats = files.each_ref().map(|file| Stat::of(file.as_fd()).unwrap());
        let add = |stat: &Stat| {
            let place = Place { parent: ROOT_ID, name: c"file".to_owned() };
            let node = Node::new(table.new_id(), stat, place, MOUNT, false, None);
            table.add(node, stat, 2).map(|node| node.id)
        };
        let one = add(&stats[0]).unwrap();
        assert_eq!(add(&stats[0]).unwrap(), one, "a file has one node");
        add(&stats[1]).unwrap();
        assert_eq!(add(&stats[2]).unwrap_err().raw_os_error(), Some(libc::ENFILE));
        table.forget(one, 1);
        assert!(add(&stats[2]).is_err(), "the guest was told of it twice");
        table.forget(one, 1);
        assert!(add(&stats[2]).unwrap() > one);
        assert!(table.find(one).is_err() && table.len() == 2);
    }
}

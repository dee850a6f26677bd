//! Number of requests, by classes of operations.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use fuse_backend_rs::abi::fuse_abi::Opcode;

use super::dispatch::{TMPFILE, named};

/// Names of the classes.
const CLASSES: [&str; 9] =
    ["attributes", "close", "directory", "forget", "lock", "names", "open", "read", "write"];

/// The class of all other operations.
const OTHER: &str = "other";

/// Counters of the requests. Workers add, and the main thread reads.
#[derive(Debug, Default)]
pub struct RequestCounts {
    classes: [AtomicU64; CLASSES.len()],
    other: AtomicU64,
}

impl RequestCounts {
    /// Counts a request. The number of its operation is the guest's word.
    pub(super) fn count(&self, opcode: u32) {
        let class = class(opcode).and_then(|class| CLASSES.iter().position(|name| *name == class));
        let counter = class.map_or(&self.other, |class| &self.classes[class]);
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the counts that are not zero.
    pub fn read(&self) -> BTreeMap<String, u64> {
        let counters = CLASSES.iter().zip(&self.classes).chain([(&OTHER, &self.other)]);
        counters
            .map(|(name, counter)| ((*name).to_owned(), counter.load(Ordering::Relaxed)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }
}

fn class(opcode: u32) -> Option<&'static str> {
    if opcode == TMPFILE {
        return Some("open");
    }
    Some(match named(opcode)? {
        Opcode::Open | Opcode::Create | Opcode::Opendir => "open",
        Opcode::Release | Opcode::Releasedir | Opcode::Flush => "close",
        Opcode::Read => "read",
        Opcode::Write | Opcode::Fsync | Opcode::Fsyncdir | Opcode::Fallocate => "write",
        Opcode::Readdir | Opcode::Readdirplus => "directory",
        Opcode::Forget | Opcode::BatchForget => "forget",
        Opcode::Getlk | Opcode::Setlk | Opcode::Setlkw => "lock",
        Opcode::Lookup
        | Opcode::Readlink
        | Opcode::Symlink
        | Opcode::Mknod
        | Opcode::Mkdir
        | Opcode::Unlink
        | Opcode::Rmdir
        | Opcode::Rename
        | Opcode::Rename2
        | Opcode::Link => "names",
        Opcode::Getattr
        | Opcode::Setattr
        | Opcode::Statfs
        | Opcode::Setxattr
        | Opcode::Getxattr
        | Opcode::Listxattr
        | Opcode::Removexattr => "attributes",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_has_one_class() {
        let counts = RequestCounts::default();
        assert!(counts.read().is_empty());
        for opcode in [Opcode::Lookup as u32, Opcode::Rename2 as u32, TMPFILE, 0, 7, u32::MAX] {
            counts.count(opcode);
        }
        let expected = [("names", 2), ("open", 1), ("other", 3)];
        assert_eq!(counts.read(), expected.map(|(name, count)| (name.to_owned(), count)).into());
        let known = (0..100).filter_map(class).all(|class| CLASSES.contains(&class));
        assert!(known && CLASSES.is_sorted());
    }
}

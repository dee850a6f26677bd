//! Idle descriptors in mounts that the host may remove. An open descriptor makes its mount busy, so
//! an unused one is closed within a second.

use std::io;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::worker::{Stop, wait_for_work, wait_some};
use super::node::Node;
use crate::sync::lock;

/// Time between two checks. A descriptor that was not used between them is closed.
const PERIOD: Duration = Duration::from_millis(400);

/// Nodes whose idle descriptors are closed.
pub(super) struct Idle {
    watched: Mutex<Vec<Weak<Node>>>,
    first: EventFd,
}

impl Idle {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { watched: Mutex::default(), first: EventFd::new(EFD_NONBLOCK)? })
    }

    /// Watches a node that just got a descriptor, if the host may remove its mount.
    pub(super) fn watch(&self, node: &Arc<Node>) {
        if !node.mount.is_host_owned() || node.set_watched(true) {
            return;
        }
        let mut watched = lock(&self.watched);
        watched.push(Arc::downgrade(node));
        if watched.len() == 1 {
            // A full counter is readable as well.
            let _ = self.first.write(1);
        }
    }

    /// Closes idle descriptors until the stop.
    pub(super) fn close_while_running(&self, stop: &Stop) {
        loop {
            if lock(&self.watched).is_empty() {
                if !wait_for_work(stop, &[&self.first]) {
                    return;
                }
            } else if !wait_some(stop, PERIOD) {
                return;
            }
            self.close_idle();
        }
    }

    /// Closes the descriptors that were not used since the last call.
    fn close_idle(&self) {
        let watched = std::mem::take(&mut *lock(&self.watched));
        let mut left = Vec::new();
        for weak in watched {
            let Some(node) = weak.upgrade() else { continue };
            // First: a thread that opens a descriptor from here on has the node watched again.
            node.set_watched(false);
            let closed = node.take_file(true);
            if closed.is_none() && node.holds_file() && !node.set_watched(true) {
                left.push(weak);
            }
        }
        lock(&self.watched).append(&mut left);
    }
}

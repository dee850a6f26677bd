//! Threads that do nothing. Each has a pid of the host that stands for a process of the guest.
//!
//! Callers look for namespaces at that pid: Docker for the network namespace, and containerd for
//! those of a pod's first container. Each process has a pid of its own, so that a path such as
//! `/proc/PID/ns/pid` tells which container it means. Others take `/proc/PID/root` for the
//! container's root file system, so it is that.

use std::{os::fd::OwnedFd, sync::Arc, sync::mpsc, thread};

use crate::{
    error::{Error, Explain, Result},
    microvm::mount_view::take_root,
};

/// Stack of a parked thread in bytes. It needs very little.
const STACK: usize = 16 << 10;

/// A parked thread, which ends when this is dropped.
#[derive(Debug)]
pub(super) struct Parked {
    pid: i32,
    /// Dropped to wake the thread.
    wake: Option<mpsc::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Parked {
    /// Parks a thread in the namespaces of the calling thread. `root` is a directory, the thread's
    /// root.
    pub(super) fn new(root: Arc<OwnedFd>) -> Result<Self> {
        let what = || "cannot start a thread for a task".to_owned();
        let (wake, woken) = mpsc::channel();
        let (tell, told) = mpsc::sync_channel(1);
        let thread = thread::Builder::new()
            .name("isopod-task".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                let taken = take_root(&root).map(|()| rustix::thread::gettid());
                drop(root);
                let _ = tell.send(taken);
                // An error means that the thread is not needed any more.
                let _ = woken.recv();
            })
            .explain(what)?;
        let pid = told.recv().map_err(|_| Error::new("a thread for a task ended at once"))?;
        let pid = pid.explain(what)?.as_raw_nonzero().get();
        Ok(Self { pid, wake: Some(wake), thread: Some(thread) })
    }

    /// Pid of the thread.
    pub(super) fn pid(&self) -> i32 {
        self.pid
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        self.wake = None;
        // Joined: its root keeps the container's root file system mounted.
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_thread_has_a_pid_until_it_is_dropped() {
        let root = Arc::new(OwnedFd::from(std::fs::File::open("/usr").unwrap()));
        let (one, two) = (Parked::new(Arc::clone(&root)).unwrap(), Parked::new(root).unwrap());
        assert_ne!(one.pid(), two.pid());
        let namespace = format!("/proc/{}/ns/net", one.pid());
        let own = std::fs::read_link("/proc/self/ns/net").unwrap();
        assert_eq!(std::fs::read_link(&namespace).unwrap(), own);
        // Only root can change its root, and tests of this crate run as root.
        let shown = std::fs::read_link(format!("/proc/{}/root", one.pid())).unwrap();
        assert_eq!(shown, std::path::Path::new("/usr"));
        drop(one);
        assert!(std::fs::read_link(&namespace).is_err());
    }
}

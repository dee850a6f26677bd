//! Work in the mount namespace of another sandbox process.

use std::{
    fs::{self, File},
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
};

use rustix::{
    fs::{Mode, OFlags, open},
    process::{chroot, fchdir},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};

use crate::{
    error::{Error, Explain, Result},
    process_id::ProcessId,
};

/// Name of the sandbox process's thread that goes on to see the host.
pub(crate) const WORKER: &str = "isopod-worker";

/// Mount namespace and root of another sandbox process.
pub(crate) struct Origin {
    namespace: File,
    root: OwnedFd,
    pid: i32,
}

impl Origin {
    /// Opens the namespace and the root of `process`. `None` if the process has ended, or is ending
    /// and has left them.
    pub(crate) fn of(process: ProcessId) -> Result<Option<Self>> {
        let pid = process.pid;
        let find = || -> std::io::Result<Self> {
            let namespace = File::open(format!("/proc/{pid}/ns/mnt"))?;
            // Others find the mount view as the root of the namespace and of the first thread. The
            // worker's root is the host's.
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let root = open(worker(pid)?.join("root"), flags, Mode::empty())?;
            Ok(Self { namespace, root, pid })
        };
        match find() {
            // The process is still alive, so the pid was its own.
            Ok(origin) => Ok(process.is_alive().then_some(origin)),
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => Ok(None),
            Err(e) => Err(Error::because(cannot_enter(pid), e)),
        }
    }

    /// Runs `work` there, as the process sees it, on a thread that enters the namespace and then
    /// ends.
    pub(crate) fn within<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let what = || cannot_enter(self.pid);
        let go = || {
            // SAFETY: root and working directory become this thread's own, and no other code of the
            // thread runs.
            unsafe { unshare_unsafe(UnshareFlags::FS) }.explain(what)?;
            move_into_link_name_space(self.namespace.as_fd(), Some(LinkNameSpaceType::Mount))
                .explain(what)?;
            fchdir(&self.root).and_then(|()| chroot(".")).explain(what)?;
            work()
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().spawn_scoped(scope, go).explain(what)?;
            thread.join().unwrap_or_else(|_| Err(Error::new(what())))
        })
    }
}

/// Directory in /proc of the sandbox process's thread that sees the host.
fn worker(pid: i32) -> std::io::Result<PathBuf> {
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = thread?.path();
        // A thread that has ended meanwhile is not the worker.
        if fs::read_to_string(thread.join("comm")).is_ok_and(|name| name.trim_end() == WORKER) {
            return Ok(thread);
        }
    }
    Err(std::io::Error::from_raw_os_error(libc::ESRCH))
}

/// The error text for a process whose mount namespace cannot be entered.
pub(crate) fn cannot_enter(pid: i32) -> String {
    format!("cannot enter the mount namespace of process {pid}")
}

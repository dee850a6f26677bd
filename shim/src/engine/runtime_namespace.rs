//! The runtime namespace (config.md, "POSIX-platform Hooks"), for a process that has left it.

use std::{
    ffi::{CString, OsString},
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    sync::Arc,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Explain, Result};

/// The way back to the namespaces and the cgroup that the sandbox process was started in.
#[derive(Debug, Clone)]
pub(crate) struct RuntimeNamespace(Arc<Origin>);

#[derive(Debug)]
struct Origin {
    mount: OwnedFd,
    network: OwnedFd,
    /// `cgroup.procs` of the cgroup, on a host with cgroups v2.
    cgroup: Option<File>,
    /// Environment of the hooks that have none of their own.
    environment: Vec<CString>,
}

/// A [`RuntimeNamespace`] without its descriptors, for another process that gets these beside it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RuntimeNamespacePlan {
    cgroup: bool,
    environment: Vec<CString>,
}

impl RuntimeNamespacePlan {
    /// The way back of this plan, from descriptors in the order of
    /// [`RuntimeNamespace::descriptors`].
    ///
    /// # Errors
    ///
    /// If a descriptor is missing.
    pub(crate) fn with(
        self,
        descriptors: &mut impl Iterator<Item = OwnedFd>,
    ) -> Result<RuntimeNamespace> {
        let mut next = || {
            let missing = || Error::new("a namespace for the hooks was not passed");
            descriptors.next().ok_or_else(missing)
        };
        let (mount, network) = (next()?, next()?);
        let cgroup = if self.cgroup { Some(next()?.into()) } else { None };
        let environment = self.environment;
        Ok(RuntimeNamespace(Arc::new(Origin { mount, network, cgroup, environment })))
    }
}

impl RuntimeNamespace {
    /// Opens the namespaces of this process, which is about to leave them, and its cgroup.
    pub(crate) fn open(cgroup: Option<&Path>) -> Result<Self> {
        Self::open_at("/proc/self/ns/mnt", cgroup)
    }

    /// Like [`Self::open`], with the calling thread's mount namespace in place of the process's.
    /// The hooks stay in the cgroup of this process.
    pub(crate) fn open_with_mounts_of_this_thread() -> Result<Self> {
        Self::open_at("/proc/thread-self/ns/mnt", None)
    }

    fn open_at(mounts: &str, cgroup: Option<&Path>) -> Result<Self> {
        let open = |path: &str| {
            File::open(path).map(OwnedFd::from).explain(|| format!("cannot open {path}"))
        };
        // If the file is not writable, hooks stay in the cgroup of the sandbox process.
        let cgroup = cgroup
            .and_then(|cgroup| File::options().write(true).open(cgroup.join("cgroup.procs")).ok());
        let (mount, network, environment) =
            (open(mounts)?, open("/proc/self/ns/net")?, own_environment());
        let origin = Origin { mount, network, cgroup, environment };
        Ok(Self(Arc::new(origin)))
    }

    /// The descriptors, for another process.
    pub(crate) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let Origin { mount, network, cgroup, .. } = &*self.0;
        let namespaces = [mount.as_fd(), network.as_fd()];
        namespaces.into_iter().chain(cgroup.as_ref().map(AsFd::as_fd)).collect()
    }

    /// The rest, for another process.
    pub(crate) fn plan(&self) -> RuntimeNamespacePlan {
        let Origin { cgroup, environment, .. } = &*self.0;
        RuntimeNamespacePlan { cgroup: cgroup.is_some(), environment: environment.clone() }
    }

    /// Environment of the hooks that have none of their own: the caller's, as with runc.
    pub(super) fn environment(&self) -> Vec<CString> {
        self.0.environment.clone()
    }

    /// Moves the calling process back. For use between `fork` and `execve`: allocates nothing.
    pub(super) fn enter(&self) -> io::Result<()> {
        let Origin { mount, network, cgroup, .. } = &*self.0;
        if let Some(cgroup) = cgroup {
            // Fails if the cgroup is gone, because its processes have ended. Then the hook stays in
            // the cgroup of the sandbox process.
            let _ = rustix::io::write(cgroup, b"0");
        }
        move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))?;
        move_into_link_name_space(mount.as_fd(), Some(LinkNameSpaceType::Mount))?;
        Ok(())
    }
}

/// The environment of this process, which is that of the command.
pub(super) fn own_environment() -> Vec<CString> {
    let entry = |(name, value): (OsString, OsString)| {
        CString::new([name.as_bytes(), b"=", value.as_bytes()].concat()).ok()
    };
    std::env::vars_os().filter_map(entry).collect()
}

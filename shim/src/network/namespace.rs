//! Entering the network namespace that stands for the container's.

use std::{fs::File, os::fd::AsFd, path::Path};

use rustix::{
    io::Errno,
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};

use crate::{
    bundle::{NetworkNamespace, is_network_namespace},
    error::{Error, Explain, Result},
};

/// Moves the calling thread into the namespace. Threads that it starts later are there too.
pub(crate) fn enter(namespace: &NetworkNamespace) -> Result<()> {
    match namespace {
        NetworkNamespace::None => Ok(()),
        // SAFETY: a new network namespace leaves descriptors and memory as they are.
        NetworkNamespace::Own => unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
            .map_err(|e| not_permitted(e, "make a network namespace")),
        NetworkNamespace::Path(path) | NetworkNamespace::Pod(path) => enter_path(path),
    }
}

/// Moves the calling thread into the network namespace at `path`.
pub(crate) fn enter_path(path: &Path) -> Result<()> {
    let what = || format!("enter network namespace {}", path.display());
    let namespace = File::open(path).explain(|| format!("cannot {}", what()))?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|e| not_permitted(e, &what()))
}

fn not_permitted(e: Errno, what: &str) -> Error {
    match e {
        Errno::PERM => Error::new(format!("no permission to {what}: isopod has to run as root")),
        e => Error::because(format!("cannot {what}"), e),
    }
}

/// Tells whether there is a network namespace at `path`.
pub(crate) fn is_there(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| is_network_namespace(&file))
}

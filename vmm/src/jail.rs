//! What the VMM gives up before the guest runs: its view of the host's files, descriptors that it
//! was not given, and the means to get more rights.

use std::io;
use std::os::fd::OwnedFd;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{chdir, fchdir, pivot_root};

/// A step into the jail failed.
#[derive(Debug, thiserror::Error)]
#[error("entering the jail: {step}: {source}")]
pub struct JailError {
    step: &'static str,
    source: nix::Error,
}

fn step(step: &'static str) -> impl FnOnce(nix::Error) -> JailError {
    move |source| JailError { step, source }
}

/// Closes every descriptor above 2 that is not in `keep`.
///
/// # Errors
///
/// When the host's kernel has no `close_range` (before 5.9).
pub fn close_other_descriptors(keep: &[i32]) -> io::Result<()> {
    let mut keep: Vec<u32> = keep.iter().filter_map(|fd| u32::try_from(*fd).ok()).collect();
    keep.sort_unstable();
    let mut first = 3u32;
    for fd in keep.into_iter().map(Some).chain([None]) {
        let last = fd.map_or(u32::MAX, |fd| fd.saturating_sub(1));
        if first <= last {
            // SAFETY: nothing in this process owns any of these descriptors yet: it runs before
            // the first `OwnedFd` is made from a number.
            if unsafe { libc::close_range(first, last, 0) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        first = fd.map_or(u32::MAX, |fd| fd.saturating_add(1));
    }
    Ok(())
}

/// Makes `root` the root directory of this process, in a mount namespace of its own where nothing
/// else of the host is mounted. Mounts that are made below `root` outside later arrive here.
///
/// The process has to have a single thread still.
///
/// # Errors
///
/// The step that failed; the process is then in no state to go on.
pub fn enter(root: OwnedFd) -> Result<(), JailError> {
    const HERE: &str = ".";
    const NOTHING: Option<&str> = None;
    fchdir(&root).map_err(step("going to the shared directory"))?;
    // The working directory moves along into the new namespace, which a descriptor would not.
    unshare(CloneFlags::CLONE_NEWNS).map_err(step("unsharing the mount namespace"))?;
    mount(NOTHING, "/", NOTHING, MsFlags::MS_REC | MsFlags::MS_SLAVE, NOTHING)
        .map_err(step("making mounts one-way"))?;
    pivot_root(HERE, HERE).map_err(step("changing the root"))?;
    // The old root now lies on top of the new one.
    umount2(HERE, MntFlags::MNT_DETACH).map_err(step("leaving the old root"))?;
    chdir("/").map_err(step("going to the new root"))
}

/// Neither this process nor a child of it can get rights by `execve` any more.
///
/// # Errors
///
/// Never on a kernel that has KVM; the call can fail in principle.
pub fn set_no_new_privs() -> Result<(), JailError> {
    prctl::set_no_new_privs().map_err(step("setting no_new_privs"))
}

/// Raises the number of descriptors that the process may have to what the host allows: each file
/// that the guest knows of holds one.
///
/// # Errors
///
/// When the limits cannot be read or set.
pub fn raise_descriptor_limit() -> io::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

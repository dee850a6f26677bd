//! The VMM's jail. Before the guest runs, the VMM gives up the host's files, other descriptors, and
//! all ways to gain rights.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, chroot, fchdir, mkdir, pivot_root};
use rustix::thread::{CapabilitySet, CapabilitySets};

/// Error of a step into the jail.
#[derive(Debug, thiserror::Error)]
#[error("cannot enter the jail: {step}: {source}")]
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
            // SAFETY: nothing in this process owns any of these descriptors yet. The call runs
            // before the first `OwnedFd` is made from a number.
            if unsafe { libc::close_range(first, last, 0) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        first = fd.map_or(u32::MAX, |fd| fd.saturating_add(1));
    }
    Ok(())
}

/// Path of the shared directory until [`OuterRoot::enter_share`].
pub const SHARE: &str = "/share";

/// The root of the VMM's mount namespace: a read-only directory with only the shared directory at
/// [`SHARE`], this process's `/proc/self/fd`, and the namespace's `mountinfo`.
///
/// ```text
/// /                    the namespace's root; threads that serve the share stay here, because
/// |-- share            extended attributes of a file are reached through /proc/self/fd only
/// |   `-- ...          the root directory of every other thread
/// `-- proc/self/{fd,mountinfo}
/// ```
///
/// Nothing is above the namespace's root. Nothing is above the share for threads with the share as
/// their root. For threads that serve the share, `..` of the share's root is the outer root, so
/// they must never look it up for a guest.
#[derive(Debug, Clone)]
pub struct OuterRoot(Arc<OwnedFd>);

/// Makes a mount namespace of this process's own, in which only the shared directory `root` is
/// mounted of the host. Later mounts below `root` arrive in the namespace.
///
/// The process must have a single thread.
///
/// # Errors
///
/// After an error the process must exit.
pub fn enter(root: &OwnedFd) -> Result<OuterRoot, JailError> {
    const HERE: &str = ".";
    const NOTHING: Option<&str> = None;
    // A directory that every host has and the VMM no longer needs. It is covered in this namespace
    // only.
    const PLACE: &str = "/dev";
    fchdir(root).map_err(step("changing to the shared directory"))?;
    // The working directory moves to the new namespace, as a descriptor would not.
    unshare(CloneFlags::CLONE_NEWNS).map_err(step("unsharing the mount namespace"))?;
    mount(NOTHING, "/", NOTHING, MsFlags::MS_REC | MsFlags::MS_SLAVE, NOTHING)
        .map_err(step("making the mounts slave mounts"))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("none"), PLACE, Some("tmpfs"), flags, Some("mode=0755,size=64k,nr_inodes=8"))
        .map_err(step("mounting the new root"))?;
    let place = Path::new(PLACE);
    for directory in ["share", "proc", "proc/self", "proc/self/fd"] {
        mkdir(&place.join(directory), Mode::from_bits_truncate(0o755))
            .map_err(step("making the new root's directories"))?;
    }
    File::create(place.join("proc/self/mountinfo")).map_err(|source| JailError {
        step: "making the new root's files",
        source: nix::Error::from_raw(source.raw_os_error().unwrap_or(libc::EIO)),
    })?;
    for own in ["proc/self/fd", "proc/self/mountinfo"] {
        mount(
            Some(&Path::new("/").join(own)),
            &place.join(own),
            NOTHING,
            MsFlags::MS_BIND,
            NOTHING,
        )
        .map_err(step("mounting the process's own files"))?;
    }
    let whole = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(HERE), &place.join("share"), NOTHING, whole, NOTHING)
        .map_err(step("mounting the shared directory"))?;
    mount(NOTHING, PLACE, NOTHING, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | flags, NOTHING)
        .map_err(step("making the new root read-only"))?;
    chdir(PLACE).map_err(step("changing to the new root"))?;
    pivot_root(HERE, HERE).map_err(step("changing the root"))?;
    // The old root is now mounted on top of the new one.
    umount2(HERE, MntFlags::MNT_DETACH).map_err(step("unmounting the old root"))?;
    chdir("/").map_err(step("entering the new root"))?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = open("/", flags, Mode::empty()).map_err(step("opening the new root"))?;
    Ok(OuterRoot(Arc::new(root)))
}

impl OuterRoot {
    /// Makes the shared directory the root of this thread and of the threads that it starts.
    ///
    /// # Errors
    ///
    /// After an error the process must exit.
    pub fn enter_share(&self) -> Result<(), JailError> {
        chroot(SHARE).map_err(step("entering the shared directory"))?;
        chdir("/").map_err(step("changing to the shared directory's root"))
    }

    /// Takes only the calling thread back to the namespace's root.
    pub fn keep_thread(&self) -> nix::Result<()> {
        unshare(CloneFlags::CLONE_FS)?;
        fchdir(&self.0)?;
        chroot(".")
    }
}

/// Lets the calling thread keep its capabilities while it has another effective user.
///
/// A file that the thread makes belongs to that user. The user's right to the directory may come
/// from a supplementary group or a capability, which the VMM does not know.
///
/// # Errors
///
/// Without `CAP_SETPCAP`.
pub fn keep_capabilities() -> io::Result<()> {
    // include/uapi/linux/securebits.h
    const SECBIT_NO_SETUID_FIXUP: libc::c_int = 1 << 2;
    // SAFETY: the call takes numbers only.
    let bits = unsafe { libc::prctl(libc::PR_GET_SECUREBITS) };
    if bits < 0 {
        return Err(io::Error::last_os_error());
    }
    let bits = bits | SECBIT_NO_SETUID_FIXUP;
    // SAFETY: the call takes numbers only.
    if unsafe { libc::prctl(libc::PR_SET_SECUREBITS, libc::c_long::from(bits)) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Prevents this process and its children from gaining rights by `execve`.
///
/// # Errors
///
/// Never on a kernel that has KVM, although the call is fallible.
pub fn set_no_new_privs() -> Result<(), JailError> {
    prctl::set_no_new_privs().map_err(step("setting no_new_privs"))
}

/// Capabilities for serving the guest's requests:
///
/// - `CHOWN`, `DAC_OVERRIDE`, `FOWNER`, `FSETID`, `MKNOD`, `SETFCAP`: rights of the guest's root on
///   the files of the share;
/// - `SETUID`, `SETGID`: a new file belongs to the user and group of the request;
/// - `SETPCAP`: [`keep_capabilities`];
/// - `SYS_CHROOT`: [`OuterRoot::keep_thread`].
///
/// Without `SYS_PTRACE`, a bind mount of the host's `/proc` gives the guest no memory of the host's
/// processes. Without `DAC_READ_SEARCH`, no file handle opens other files of the host's file
/// system. `SYS_ADMIN` is left out too.
pub const SERVING: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::SYS_CHROOT);

/// Removes all capabilities except `kept` from the calling thread and from the threads that it
/// starts, for ever. Capabilities that the thread lacks are not added.
///
/// # Errors
///
/// For example without `CAP_SETPCAP`.
pub fn keep_only(kept: CapabilitySet) -> Result<(), JailError> {
    let failed = |step| {
        move |e: rustix::io::Errno| JailError {
            step,
            source: nix::Error::from_raw(e.raw_os_error()),
        }
    };
    for number in 0..u64::BITS {
        let one = CapabilitySet::from_bits_retain(1 << number);
        // The kernel refuses numbers above its last capability.
        let Ok(present) = rustix::thread::capability_is_in_bounding_set(one) else { break };
        if present && !kept.contains(one) {
            rustix::thread::remove_capability_from_bounding_set(one)
                .map_err(failed("dropping a capability from the bounding set"))?;
        }
    }
    rustix::thread::clear_ambient_capability_set()
        .map_err(failed("clearing the ambient capabilities"))?;
    let now = rustix::thread::capabilities(None).map_err(failed("reading the capabilities"))?;
    let sets = CapabilitySets {
        effective: now.effective & kept,
        permitted: now.permitted & kept,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, sets).map_err(failed("dropping capabilities"))
}

/// Forbids core dumps of this process, and access to its memory without `CAP_SYS_PTRACE`. The
/// buffers hold the guest's data.
///
/// # Errors
///
/// Never on a kernel that has KVM, although the call is fallible.
pub fn set_undumpable() -> Result<(), JailError> {
    prctl::set_dumpable(false).map_err(step("forbidding core dumps"))
}

/// Raises the limit of open descriptors to the host's maximum, because the guest's files need many.
pub fn raise_descriptor_limit() -> io::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

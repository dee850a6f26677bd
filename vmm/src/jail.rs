//! What the VMM gives up before the guest runs: its view of the host's files, descriptors that it
//! was not given, and the means to get more rights.

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

/// Where the shared directory is until [`Antechamber::close`].
pub const SHARE: &str = "/share";

/// The root of the VMM's mount namespace: a read-only directory with nothing in it but the shared
/// directory at [`SHARE`], this process's `/proc/self/fd`, and the namespace's `mountinfo`.
///
/// ```text
/// /                    the namespace's root; threads that serve the share stay here, because
/// |-- share            extended attributes of a file are reached through /proc/self/fd only
/// |   `-- ...          the root directory of every other thread
/// `-- proc/self/{fd,mountinfo}
/// ```
///
/// Above the namespace's root there is nothing, and above the share there is nothing for threads that
/// have it as their root. For those that stay, `..` of the share's root is the antechamber: it is up
/// to them never to look it up for a guest.
#[derive(Debug, Clone)]
pub struct Antechamber(Arc<OwnedFd>);

/// Makes a mount namespace of this process's own, where nothing else of the host is mounted than the
/// shared directory `root`. Mounts that are made below `root` outside later arrive here.
///
/// The process has to have a single thread still.
///
/// # Errors
///
/// The step that failed; the process is then in no state to go on.
pub fn enter(root: &OwnedFd) -> Result<Antechamber, JailError> {
    const HERE: &str = ".";
    const NOTHING: Option<&str> = None;
    // Any directory that every host has, and nothing here needs any more. It is covered in this
    // namespace only.
    const PLACE: &str = "/dev";
    fchdir(root).map_err(step("going to the shared directory"))?;
    // The working directory moves along into the new namespace, which a descriptor would not.
    unshare(CloneFlags::CLONE_NEWNS).map_err(step("unsharing the mount namespace"))?;
    mount(NOTHING, "/", NOTHING, MsFlags::MS_REC | MsFlags::MS_SLAVE, NOTHING)
        .map_err(step("making mounts one-way"))?;
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
    chdir(PLACE).map_err(step("going to the new root"))?;
    pivot_root(HERE, HERE).map_err(step("changing the root"))?;
    // The old root now lies on top of the new one.
    umount2(HERE, MntFlags::MNT_DETACH).map_err(step("leaving the old root"))?;
    chdir("/").map_err(step("entering the new root"))?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = open("/", flags, Mode::empty()).map_err(step("opening the new root"))?;
    Ok(Antechamber(Arc::new(root)))
}

impl Antechamber {
    /// Makes the shared directory the root of this thread and all that it starts.
    ///
    /// # Errors
    ///
    /// The step that failed; the process is then in no state to go on.
    pub fn close(&self) -> Result<(), JailError> {
        chroot(SHARE).map_err(step("entering the shared directory"))?;
        chdir("/").map_err(step("going to the shared directory's root"))
    }

    /// Takes the calling thread, and it alone, back to the namespace's root.
    ///
    /// # Errors
    ///
    /// The step that failed.
    pub fn stay(&self) -> nix::Result<()> {
        unshare(CloneFlags::CLONE_FS)?;
        fchdir(&self.0)?;
        chroot(".")
    }
}

/// Lets the calling thread keep its capabilities while it has another effective user. A file that it
/// makes then belongs to that user, who may have been let into the directory by means that are not
/// known here: a supplementary group, or a capability.
///
/// # Errors
///
/// Without `CAP_SETPCAP`.
pub fn keep_capabilities() -> io::Result<()> {
    // include/uapi/linux/securebits.h
    const SECBIT_NO_SETUID_FIXUP: libc::c_int = 1 << 2;
    // SAFETY: it takes numbers only.
    let bits = unsafe { libc::prctl(libc::PR_GET_SECUREBITS) };
    if bits < 0 {
        return Err(io::Error::last_os_error());
    }
    let bits = bits | SECBIT_NO_SETUID_FIXUP;
    // SAFETY: it takes numbers only.
    if unsafe { libc::prctl(libc::PR_SET_SECUREBITS, libc::c_long::from(bits)) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Neither this process nor a child of it can get rights by `execve` any more.
///
/// # Errors
///
/// Never on a kernel that has KVM; the call can fail in principle.
pub fn set_no_new_privs() -> Result<(), JailError> {
    prctl::set_no_new_privs().map_err(step("setting no_new_privs"))
}

/// The capabilities that the guest's requests are served with:
///
/// - `CHOWN`, `DAC_OVERRIDE`, `FOWNER`, `FSETID`, `MKNOD`, `SETFCAP`: rights of root in the guest on the
///   files of the share;
/// - `SETUID`, `SETGID`: a new file belongs to the user and group of the request;
/// - `SETPCAP`: [`keep_capabilities`];
/// - `SYS_CHROOT`: [`Antechamber::stay`].
///
/// `SYS_PTRACE` is not among them: a bind mount of the host's `/proc` gives the guest no memory of the
/// host's processes. Neither are `DAC_READ_SEARCH`, by which a file handle opens any file of the host's
/// file system, and `SYS_ADMIN`.
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

/// Takes all capabilities but `kept` from the calling thread and the threads that it starts, for good.
/// Those that the thread does not have stay missing.
///
/// # Errors
///
/// The step that failed, for example without `CAP_SETPCAP`.
pub fn keep_only(kept: CapabilitySet) -> Result<(), JailError> {
    let failed = |step| {
        move |e: rustix::io::Errno| JailError {
            step,
            source: nix::Error::from_raw(e.raw_os_error()),
        }
    };
    for number in 0..u64::BITS {
        let one = CapabilitySet::from_bits_retain(1 << number);
        // The kernel refuses numbers beyond its last capability.
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

/// Makes this process one whose memory no process without `CAP_SYS_PTRACE` reads, and of which the
/// kernel writes no core dump: it has the guest's data in its buffers.
///
/// # Errors
///
/// Never on a kernel that has KVM; the call can fail in principle.
pub fn set_undumpable() -> Result<(), JailError> {
    prctl::set_dumpable(false).map_err(step("forbidding core dumps"))
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

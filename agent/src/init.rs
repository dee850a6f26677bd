//! Set-up by PID 1 before it serves: file systems, limits and devices.

use std::fs;
use std::io;

use rustix::fs::{CWD, Mode, OFlags, mkdir, open};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MoveMountFlags, OpenTreeFlags, mount, mount_remount, move_mount, open_tree,
};
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::container::cgroup::{self, CGROUP_ROOT};
use crate::error::{Context as _, Result};
use crate::log::log_warn;

const NOSUID: MountFlags = MountFlags::NOSUID;
const NO_PROGRAMS: MountFlags =
    MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// Target, type, flags and data of mounts, parents first.
const MOUNTS: [(&str, &str, MountFlags, &std::ffi::CStr); 5] = [
    ("/proc", "proc", NO_PROGRAMS, c""),
    ("/sys", "sysfs", NO_PROGRAMS, c""),
    ("/run", "tmpfs", NO_PROGRAMS, c"mode=755"),
    ("/dev/pts", "devpts", NOSUID, c"mode=620,gid=5,ptmxmode=666"),
    // With `nsdelegate`, processes in a cgroup namespace cannot change the limits of its root.
    (CGROUP_ROOT, "cgroup2", NO_PROGRAMS, c"nsdelegate"),
];

/// Sets the guest up. After an error the guest is unusable.
pub(crate) fn boot() -> Result<()> {
    // Containers see some of the agent's directories, for example their own cgroups.
    rustix::process::umask(Mode::from_raw_mode(0o022));
    own_root()?;
    make_dir("/dev")?;
    mount_on("/dev", "devtmpfs", NOSUID, c"mode=755")?;
    connect_stdio()?;
    crate::log::open();
    for (target, kind, flags, data) in MOUNTS {
        make_dir(target)?;
        mount_on(target, kind, flags, data)?;
    }
    seal_root()?;
    raise_limits();
    crate::network::loopback_up()?;
    cgroup::prepare()
}

/// Mounts the root directory on top of itself. The kernel's first root cannot be exchanged by
/// pivot_root(2), and containers have to exchange theirs.
///
/// The kernel has started this program from the first root. The containers' processes start from
/// `/proc/self/exe`, which is there too. So the first root is sealed at once.
fn own_root() -> Result<()> {
    let what = || "make the root a mount of its own";
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let root = open_tree(CWD, "/", flags | OpenTreeFlags::AT_RECURSIVE).context(what)?;
    // The seal follows the copy, which has to stay writable a little longer.
    seal_root()?;
    move_mount(&root, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).context(what)?;
    rustix::process::fchdir(&root).context(what)?;
    rustix::process::chroot(".").context(what)
}

/// Makes the mount of the current root read-only.
///
/// Processes of containers can reach the agent's program through `/proc/self/exe`, and could change
/// the program that the next process starts as. `ETXTBSY` is no protection: some kernels allow
/// writes to a running program.
///
/// Uses mount(2), because some kernels refuse mount_setattr(2) for their first root.
fn seal_root() -> Result<()> {
    mount_remount("/", MountFlags::BIND | MountFlags::RDONLY, c"")
        .context(|| "make the guest's root read-only")
}

fn make_dir(path: &str) -> Result<()> {
    match mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(e) => Err(e).context(|| format!("create {path}")),
    }
}

fn mount_on(target: &str, kind: &str, flags: MountFlags, data: &std::ffi::CStr) -> Result<()> {
    match mount(kind, target, kind, flags, data) {
        // The kernel may be built to mount some of these itself.
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(e) => Err(e).context(|| format!("mount {kind} on {target}")),
    }
}

/// Opens /dev/null for closed standard streams. The kernel leaves them closed when there is no
/// console, and the next opened files would get their numbers.
fn connect_stdio() -> Result<()> {
    loop {
        let null = open("/dev/null", OFlags::RDWR, Mode::empty()).context(|| "open /dev/null")?;
        if std::os::fd::AsRawFd::as_raw_fd(&null) > 2 {
            return Ok(());
        }
        // One of the three was closed, and stays /dev/null.
        let _ = std::os::fd::IntoRawFd::into_raw_fd(null);
    }
}

/// Raises the limits to those that other init systems give to services. A limit that cannot be
/// raised stays.
fn raise_limits() {
    const FILES: u64 = 1 << 20;
    for (name, resource, value) in [
        ("open files", Resource::Nofile, Some(FILES)),
        // The pids controller limits containers.
        ("processes", Resource::Nproc, None),
    ] {
        if let Err(e) = setrlimit(resource, Rlimit { current: value, maximum: value }) {
            log_warn!("cannot raise the limit on {name}: {e}");
        }
    }
    // The OOM killer never picks the machine's PID 1. But children inherit the score, and keep it
    // until they get their own.
    if let Err(e) = protect_from_oom() {
        log_warn!("cannot protect the agent from the out-of-memory killer: {e}");
    }
}

fn protect_from_oom() -> io::Result<()> {
    fs::write("/proc/self/oom_score_adj", "-1000")
}

//! What PID 1 does before it serves: the file systems, limits and devices that everything needs.

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

/// Target, type, flags and data, in an order in which each finds its parent.
const MOUNTS: [(&str, &str, MountFlags, &std::ffi::CStr); 5] = [
    ("/proc", "proc", NO_PROGRAMS, c""),
    ("/sys", "sysfs", NO_PROGRAMS, c""),
    ("/run", "tmpfs", NO_PROGRAMS, c"mode=755"),
    ("/dev/pts", "devpts", NOSUID, c"mode=620,gid=5,ptmxmode=666"),
    // With `nsdelegate` the limits on the root of a cgroup namespace are not for those inside of it.
    (CGROUP_ROOT, "cgroup2", NO_PROGRAMS, c"nsdelegate"),
];

/// Sets the guest up.
///
/// # Errors
///
/// The step that failed; the guest cannot be used then.
pub(crate) fn boot() -> Result<()> {
    // Containers see some of the directories that the agent makes: the cgroup of each, for one.
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

/// Puts the root directory on top of itself as a mount of its own. The kernel's first root can
/// never be exchanged, and containers have to exchange theirs.
///
/// The kernel has started this program from the first root, below, and the containers' processes
/// start from `/proc/self/exe`, which is there as well. That mount is therefore sealed at once.
fn own_root() -> Result<()> {
    let what = || "make the root a mount of its own";
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let root = open_tree(CWD, "/", flags | OpenTreeFlags::AT_RECURSIVE).context(what)?;
    // After the copy, which has to be written to a little longer.
    seal_root()?;
    move_mount(&root, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).context(what)?;
    rustix::process::fchdir(&root).context(what)?;
    rustix::process::chroot(".").context(what)
}

/// Makes the mount that is the root now read-only. Processes of containers can reach the agent's
/// program through `/proc/self/exe`, and could change what the next one starts as. That a program
/// cannot be written while it runs is no protection: there are kernels without this rule.
///
/// By the old call: some kernels refuse the new one for their first root.
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
        // The kernel can be built to mount some of these itself.
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(e) => Err(e).context(|| format!("mount {kind} on {target}")),
    }
}

/// The kernel leaves the standard streams closed when there is no console. They have to be
/// something, or the next files that are opened become them.
fn connect_stdio() -> Result<()> {
    loop {
        let null = open("/dev/null", OFlags::RDWR, Mode::empty()).context(|| "open /dev/null")?;
        if std::os::fd::AsRawFd::as_raw_fd(&null) > 2 {
            return Ok(());
        }
        // One of the three was closed and now is this one, for good.
        let _ = std::os::fd::IntoRawFd::into_raw_fd(null);
    }
}

/// What other systems' init gives to services. A limit that cannot be raised stays.
fn raise_limits() {
    const FILES: u64 = 1 << 20;
    for (name, resource, value) in [
        ("open files", Resource::Nofile, Some(FILES)),
        // Containers have the pids controller.
        ("processes", Resource::Nproc, None),
    ] {
        if let Err(e) = setrlimit(resource, Rlimit { current: value, maximum: value }) {
            log_warn!("cannot raise the limit on {name}: {e}");
        }
    }
    // The kernel's out-of-memory killer never picks PID 1 of the machine, but is told anyway so
    // that what it starts is not more important before it has its own score.
    if let Err(e) = protect_from_oom() {
        log_warn!("cannot protect the agent from the out-of-memory killer: {e}");
    }
}

fn protect_from_oom() -> io::Result<()> {
    fs::write("/proc/self/oom_score_adj", "-1000")
}

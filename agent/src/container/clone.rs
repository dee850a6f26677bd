//! Clones the agent into a new process of a container, which executes the agent's program again.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::path::Path;

use isopod_protocol::agent::Network;
use rustix::fs::OFlags;
use rustix::io::{Errno, retry_on_intr};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions, waitpid};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use super::cgroup::{CGROUP_ROOT, Cgroup};
use super::init::{CHANNEL_FD, INIT_NAME};
use super::namespaces::{self, Namespaces};
use super::path;
use crate::error::{Context as _, Error, Result};
use crate::oci::{Linux, NamespaceKind};
use crate::reaper::{ExitReceiver, Reaper};

/// Flags of `clone3` that exceed the C library's type for them (linux/sched.h).
const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// Flags of the clone that becomes a container's process.
const INIT_FLAGS: u64 = libc::CLONE_PIDFD as u64 | CLONE_INTO_CGROUP | CLONE_CLEAR_SIGHAND;

/// Flags of the clone that clones once more.
const HELPER_FLAGS: u64 = libc::CLONE_FILES as u64 | CLONE_CLEAR_SIGHAND;

/// Source of the namespaces that the new process inherits.
pub(crate) enum Parent<'a> {
    /// New namespaces, and namespaces shared with other containers, for a container's first
    /// process.
    New {
        namespaces: Namespaces,
        linux: &'a Linux,
        network: Option<&'a Network>,
        shared: &'a [Shared],
    },
    /// Namespaces of the container with this first process. `group` is the requested cgroup below
    /// the container's, if any.
    Join {
        namespaces: Namespaces,
        init: BorrowedFd<'a>,
        init_pid: i32,
        group: Option<BorrowedFd<'a>>,
    },
}

/// Namespaces of another container, whose first process has to live when they are entered.
#[derive(Debug)]
pub(crate) struct Shared {
    /// The other container's id.
    pub(crate) container: String,
    /// The other container's first process.
    pub(crate) pid: i32,
    /// A pidfd of the same process.
    pub(crate) init: OwnedFd,
    /// `CLONE_NEW*` bits.
    pub(crate) bits: u32,
}

impl Shared {
    fn has_user(&self) -> bool {
        ThreadNameSpaceType::from_bits_retain(self.bits).contains(ThreadNameSpaceType::USER)
    }
}

impl Parent<'_> {
    pub(super) fn namespaces(&self) -> Namespaces {
        match self {
            Self::New { namespaces, .. } | Self::Join { namespaces, .. } => *namespaces,
        }
    }
}

const OPERATION: &str = "start the process of the container";

/// The error of a failed clone.
fn clone_error(e: io::Error) -> Error {
    let hint = match e.raw_os_error() {
        Some(libc::EAGAIN) => " (the container's linux.resources.pids limit is reached)",
        _ => "",
    };
    Error::internal(format!("{OPERATION}: {}{hint}", crate::error::reason(&e)))
}

pub(super) fn clone_process(
    reaper: &Reaper,
    parent: &Parent<'_>,
    cgroup: &Cgroup,
    channel: &OwnedFd,
) -> Result<(i32, OwnedFd, ExitReceiver)> {
    let context = || OPERATION;
    let cgroup = cgroup.dir();
    match parent {
        Parent::New { namespaces, linux, shared, .. } => {
            let flags = namespaces.clone_flags();
            let user = shared.iter().find(|shared| shared.has_user());
            if let Some(user) = user {
                namespaces::check_shared_ids(user.pid, &user.container, linux)?;
                let clone = || {
                    reaper.spawn(|| {
                        clone_by_helper(user.init.as_fd(), flags, cgroup.as_fd(), channel)
                    })
                };
                return in_namespaces_of(shared, clone);
            }
            let gate = if namespaces.is_own(NamespaceKind::User) {
                Some(pipe_with(PipeFlags::CLOEXEC).context(context)?)
            } else {
                None
            };
            let before = match &gate {
                Some((read, write)) => Before::Gate(read.as_raw_fd(), write.as_raw_fd()),
                None => Before::Nothing,
            };
            let clone = || reaper.spawn(|| clone_init(flags, cgroup.as_fd(), channel, before));
            let (pid, pidfd, exit) = in_namespaces_of(shared, clone)?;
            if let Some((_, open)) = gate {
                let opened = namespaces::map_ids(pid, linux)
                    .and_then(|()| rustix::io::write(&open, &[1]).context(context));
                if let Err(e) = opened {
                    // Closing the gate would not do: a clone that runs at the same time may have
                    // inherited it.
                    kill(&pidfd);
                    return Err(e);
                }
            }
            Ok((pid, pidfd, exit))
        }
        Parent::Join { namespaces, init, init_pid, group } => {
            let join = namespaces.has(NamespaceKind::Pid).then_some(*init);
            let clone = |cgroup: BorrowedFd<'_>| {
                reaper.spawn(|| clone_init(0, cgroup, channel, Before::Nothing))
            };
            let clone_into = |cgroup: BorrowedFd<'_>| match join {
                None => clone(cgroup),
                Some(init) => in_thread(|| {
                    move_into_thread_name_spaces(init, ThreadNameSpaceType::PROCESS_ID)?;
                    clone(cgroup)
                }),
            };
            if let Some(group) = group {
                return clone_into(*group).map_err(|e| match e.raw_os_error() {
                    Some(libc::EBUSY) => Error::internal(format!(
                        "{OPERATION}: the cgroup that was asked for takes no processes, since its \
                         controllers are on for those below it"
                    )),
                    _ => clone_error(e),
                });
            }
            match clone_into(cgroup.as_fd()) {
                // The container has enabled controllers for groups below its own, which then takes
                // no processes.
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                    clone_into(cgroup_of(*init_pid)?.as_fd()).map_err(clone_error)
                }
                result => result.map_err(clone_error),
            }
        }
    }
}

/// Calls `clone` in the namespaces of other containers, which the new process inherits. A user
/// namespace is left to `clone`: no process with threads can enter one.
fn in_namespaces_of<T: Send>(
    shared: &[Shared],
    clone: impl FnOnce() -> io::Result<T> + Send,
) -> Result<T> {
    if shared.is_empty() {
        return clone().map_err(clone_error);
    }
    in_thread(|| {
        for Shared { container, init, bits, .. } in shared {
            let flags = ThreadNameSpaceType::from_bits_retain(*bits) - ThreadNameSpaceType::USER;
            if !flags.is_empty()
                && let Err(e) = move_into_thread_name_spaces(init.as_fd(), flags) {
                return Ok(Err((e, container)));
            }
        }
        clone().map(Ok)
    })
    .map_err(clone_error)?
    .map_err(|(e, container)| match e {
        Errno::SRCH => Error::state(format!(
            "linux.namespaces: container {container:?}, whose namespaces are to be shared, has ended"
        )),
        e => Error::internal(format!(
            "enter the namespaces of container {container:?}: {}",
            crate::error::reason(&e.into())
        )),
    })
}

/// Runs `work` in a thread of its own: namespaces belong to a thread, and this thread ends.
fn in_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, work)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    })
}

fn cgroup_of(pid: i32) -> Result<OwnedFd> {
    let file = format!("/proc/{pid}/cgroup");
    let text = fs::read_to_string(&file).context(|| format!("read {file}"))?;
    let own = text.lines().find_map(|line| line.strip_prefix("0::/"));
    let group = Path::new(CGROUP_ROOT).join(own.unwrap_or_default());
    path::open_in_guest(&group, OFlags::DIRECTORY | OFlags::RDONLY)
        .context(|| format!("open the cgroup {}", group.display()))
}

/// Calls `clone3` into a cgroup and namespaces; the child executes the agent's program again.
fn clone_init(
    namespaces: u64,
    cgroup: BorrowedFd<'_>,
    channel: &OwnedFd,
    before: Before,
) -> io::Result<(i32, OwnedFd)> {
    let mut pidfd = -1;
    let (flags, channel) = (INIT_FLAGS | namespaces, channel.as_raw_fd());
    let pid = clone3(flags, libc::SIGCHLD, cgroup.as_raw_fd(), &mut pidfd);
    if pid == 0 {
        exec_init(channel, before);
    }
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has stored a new descriptor there, and nothing else owns it.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok((i32::try_from(pid).map_err(io::Error::other)?, pidfd))
}

/// As [`clone_init`], in the user namespace of the process `user` too.
///
/// A process with threads cannot enter a user namespace, and the other new namespaces have to belong
/// to this one. So a helper without threads enters the user namespace, and clones the process as a
/// child of the agent. The helper shares the agent's descriptors, for the new pidfd.
fn clone_by_helper(
    user: BorrowedFd<'_>,
    namespaces: u64,
    cgroup: BorrowedFd<'_>,
    channel: &OwnedFd,
) -> io::Result<(i32, OwnedFd)> {
    let (told, tell) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    let (user, cgroup, channel) = (user.as_raw_fd(), cgroup.as_raw_fd(), channel.as_raw_fd());
    let helper = clone3(HELPER_FLAGS, libc::SIGCHLD, -1, &mut -1);
    if helper == 0 {
        help(user, namespaces, cgroup, channel, tell.as_raw_fd());
    }
    if helper < 0 {
        return Err(io::Error::last_os_error());
    }
    let helper = i32::try_from(helper).ok().and_then(Pid::from_raw);
    let helper = helper.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
    // The caller holds the lock of the reaper, which would take the helper's end otherwise.
    retry_on_intr(|| waitpid(Some(helper), WaitOptions::empty()))?;
    let mut answer = [0; size_of::<i32>()];
    // Nothing is there if the helper was killed.
    if rustix::io::read(&told, &mut answer)? != answer.len() {
        return Err(io::Error::from_raw_os_error(libc::EIO));
    }
    let pidfd = i32::from_ne_bytes(answer);
    if pidfd < 0 {
        return Err(io::Error::from_raw_os_error(-pidfd));
    }
    // SAFETY: the kernel has stored a new descriptor there for the helper. The helper shared this
    // table, and has ended.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok((pid_of(&pidfd)?, pidfd))
}

/// The pid of a process, as this process sees it (fdinfo of proc_pid_fdinfo(5)).
fn pid_of(pidfd: &OwnedFd) -> io::Result<i32> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    let pid = info.lines().find_map(|line| line.strip_prefix("Pid:"));
    let pid = pid.and_then(|pid| pid.trim().parse().ok()).filter(|pid| *pid > 0);
    pid.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))
}

/// clone3(2) without a stack or shared memory, which is a fork. Allocates nothing. `pidfd` and
/// `cgroup` count with the flags that use them.
fn clone3(flags: u64, exit_signal: i32, cgroup: RawFd, pidfd: &mut libc::c_int) -> libc::c_long {
    // SAFETY: `clone_args` is plain data, and zeros ask for nothing.
    let mut clone: libc::clone_args = unsafe { std::mem::zeroed() };
    clone.flags = flags;
    clone.pidfd = std::ptr::from_mut(pidfd) as u64;
    clone.exit_signal = exit_signal.unsigned_abs().into();
    if flags & CLONE_INTO_CGROUP != 0 {
        clone.cgroup = cgroup.unsigned_abs().into();
    }
    let size = size_of::<libc::clone_args>();
    // SAFETY: the child has a copy of this memory. The callers have it run `exec_init` or `help`
    // only, which make system calls and touch no lock.
    unsafe { libc::syscall(libc::SYS_clone3, &mut clone, size) }
}

/// Runs in the helper of [`clone_by_helper`]: system calls only, no allocation, no lock. Tells the
/// new pidfd, or the negative error.
fn help(user: RawFd, namespaces: u64, cgroup: RawFd, channel: RawFd, tell: RawFd) -> ! {
    let mut pidfd = -1;
    // SAFETY: plain numbers are passed, and this process has no other thread.
    let mut result = unsafe { libc::syscall(libc::SYS_setns, user, libc::CLONE_NEWUSER) };
    if result == 0 {
        // The agent is the parent. The kernel takes the signal of the helper's own end.
        let flags = INIT_FLAGS | libc::CLONE_PARENT as u64 | namespaces;
        result = clone3(flags, 0, cgroup, &mut pidfd);
        if result == 0 {
            exec_init(channel, Before::BecomeRoot);
        }
    }
    let answer = if result < 0 {
        -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
    } else {
        pidfd
    };
    let answer = answer.to_ne_bytes();
    // SAFETY: the bytes are live. Without them the agent reports an error.
    unsafe { libc::write(tell, answer.as_ptr().cast(), answer.len()) };
    // SAFETY: ends this process and runs nothing else of it.
    unsafe { libc::_exit(0) }
}

/// Things to do in a new process before it executes the agent's program.
#[derive(Clone, Copy)]
enum Before {
    Nothing,
    /// Wait for a byte from the first descriptor, and then become root. The second is to be closed.
    Gate(RawFd, RawFd),
    /// Become root of the user namespace.
    BecomeRoot,
}

/// Runs in the child of a process with threads: system calls only, no allocation, no lock.
fn exec_init(channel: RawFd, before: Before) -> ! {
    if let Before::Gate(read, write) = before {
        // With this end open here, the read below would not end when the agent does.
        // SAFETY: this table is a copy, and nothing in this process uses the descriptor.
        unsafe { libc::close(write) };
        let mut byte = 0_u8;
        // SAFETY: one byte is read into a live variable.
        let n = unsafe { libc::read(read, (&raw mut byte).cast(), 1) };
        if n != 1 {
            // SAFETY: ends this process and runs nothing else of it.
            unsafe { libc::_exit(126) };
        }
    }
    if let Before::Gate(..) | Before::BecomeRoot = before {
        // The id mappings exist now. Only root of the user namespace keeps its capabilities across
        // execve. The C library's own calls would involve the other threads.
        // SAFETY: plain numbers are passed.
        unsafe { libc::syscall(libc::SYS_setresgid, 0, 0, 0) };
        // SAFETY: as above.
        unsafe { libc::syscall(libc::SYS_setresuid, 0, 0, 0) };
    }
    if channel == CHANNEL_FD {
        // SAFETY: clears close-on-exec of a descriptor in this process's own table.
        unsafe { libc::fcntl(channel, libc::F_SETFD, 0) };
    } else {
        // SAFETY: this table is a copy; the previous owner of the number is not needed any more.
        unsafe { libc::dup2(channel, CHANNEL_FD) };
    }
    let (args, env) = ([INIT_NAME.as_ptr(), std::ptr::null()], [std::ptr::null()]);
    // SAFETY: the C strings are constants, and the lists of them end with a null pointer.
    unsafe { libc::execve(c"/proc/self/exe".as_ptr(), args.as_ptr(), env.as_ptr()) };
    // SAFETY: as above.
    unsafe { libc::_exit(127) }
}

/// Kills a process. A process that has ended already is no error.
pub(super) fn kill(pidfd: &OwnedFd) {
    let _ = crate::syscall::pidfd_send_signal(pidfd.as_fd(), libc::SIGKILL);
}

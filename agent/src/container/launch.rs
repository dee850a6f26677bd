//! Starts the agent's program again as a container's process, and sees it through to the point
//! where it only has to be let go.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use isopod_protocol::agent::Network;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Pid;
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use super::cgroup::{CGROUP_ROOT, Cgroup};
use super::channel::{self, Channel, Request, Tag};
use super::init::{CHANNEL_FD, INIT_NAME};
use super::namespaces::{self, Namespaces};
use super::{path, rlimits};
use crate::error::{Context as _, Error, Result};
use crate::oci::{Linux, NamespaceKind, PosixRlimit};
use crate::reaper::{ExitReceiver, Reaper};

/// Flags of `clone3` that do not fit the C library's type for them (linux/sched.h).
const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// How long a process may take for one step towards `execve`. It is among the container's processes
/// by then, and a signal of theirs or a file system that they serve can stop it for ever.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Where the process is born.
pub(crate) enum Birth<'a> {
    /// Into new namespaces, and those that it shares with other containers.
    New {
        namespaces: Namespaces,
        linux: &'a Linux,
        network: Option<&'a Network>,
        shared: &'a [Shared],
    },
    /// Into those of the container whose first process this is, and into this group of it.
    Joining {
        namespaces: Namespaces,
        init: BorrowedFd<'a>,
        init_pid: i32,
        group: Option<BorrowedFd<'a>>,
    },
}

/// Namespaces of another container, which has to live when they are entered.
#[derive(Debug)]
pub(crate) struct Shared {
    /// That container's id.
    pub(crate) container: String,
    /// Its first process.
    pub(crate) init: OwnedFd,
    /// `CLONE_NEW*` bits.
    pub(crate) bits: u32,
}

impl Birth<'_> {
    fn namespaces(&self) -> Namespaces {
        match self {
            Self::New { namespaces, .. } | Self::Joining { namespaces, .. } => *namespaces,
        }
    }
}

/// Everything about a process that the agent itself has to apply from outside.
pub(crate) struct Launch<'a> {
    /// How long it may take for one step, hooks included. None if these may take for ever.
    pub(crate) patience: Option<Duration>,
    pub(crate) birth: Birth<'a>,
    pub(crate) cgroup: &'a Cgroup,
    pub(crate) request: Request,
    pub(crate) document: &'a [u8],
    /// Standard input, output and error, unless there is a terminal, and the descriptors from 3 on.
    pub(crate) streams: Vec<OwnedFd>,
    pub(crate) oom_score_adj: i32,
    pub(crate) rlimits: &'a [PosixRlimit],
}

/// A process that is ready to call `execve`.
#[derive(Debug)]
pub(crate) struct Launched {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    pub(crate) channel: Channel,
    pub(crate) exit: ExitReceiver,
    /// The master side of its terminal.
    pub(crate) terminal: Option<OwnedFd>,
}

/// Starts a process and waits until it is ready. Blocks for as long as the set-up takes.
///
/// # Errors
///
/// What went wrong, in the process's own words where it has any. The process is then dead.
pub(crate) fn launch(reaper: &Reaper, launch: Launch<'_>) -> Result<Launched> {
    let (channel, theirs) = Channel::pair(launch.patience).context(|| "make a socket pair")?;
    let (pid, pidfd, exit) = born(reaper, &launch, &theirs)?;
    drop(theirs);
    let mut launched = Launched { pid, pidfd, channel, exit, terminal: None };
    match see_through(&mut launched, launch) {
        Ok(()) => Ok(launched),
        Err(e) => {
            // It may still be running; the reaper collects it in either case.
            kill(&launched.pidfd);
            Err(e)
        }
    }
}

fn kill(pidfd: &OwnedFd) {
    // One that has ended already is what is wanted.
    let _ = crate::syscall::pidfd_send_signal(pidfd.as_fd(), libc::SIGKILL);
}

fn see_through(launched: &mut Launched, launch: Launch<'_>) -> Result<()> {
    // Before the process goes on, whose sysctls may be for these interfaces.
    if let Birth::New { network: Some(network), .. } = &launch.birth {
        crate::network::set_up(network, launched.pid, &launched.pidfd)?;
    }
    let adj = format!("/proc/{}/oom_score_adj", launched.pid);
    match fs::write(&adj, launch.oom_score_adj.to_string()) {
        // It has ended, and why comes out below.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {}
        written => {
            written.context(|| format!("set process.oomScoreAdj {}", launch.oom_score_adj))?;
        }
    }
    let request =
        serde_json::to_vec(&launch.request).map_err(|e| Error::internal(e.to_string()))?;
    let mut fds = Vec::with_capacity(1 + launch.streams.len());
    if let Birth::Joining { init, .. } = launch.birth {
        fds.push(init);
    }
    fds.extend(launch.streams.iter().map(|fd| fd.as_fd()));
    let channel = &launched.channel;
    let sent = channel
        .send(Tag::Request, &request, &fds)
        .and_then(|()| channel.send(Tag::Document, launch.document, &[]));
    // A process that could not read on has said why.
    if let Err(e) = sent
        && !is_gone(&e)
    {
        return Err(unheard(e, "send the specification to the new process"));
    }
    drop(launch.streams);
    launched.terminal = wait_until_ready(channel)?;
    // A process in a user namespace has no right to raise a limit; any other does it itself.
    if launch.birth.namespaces().has(NamespaceKind::User) {
        rlimits::set(Pid::from_raw(launched.pid), launch.rlimits)?;
    }
    Ok(())
}

/// Returns the terminal that the process has opened, if it has one.
fn wait_until_ready(channel: &Channel) -> Result<Option<OwnedFd>> {
    let mut terminal = None;
    loop {
        let message = channel.receive().map_err(|e| unheard(e, "hear from the new process"))?;
        let Some(message) = message else {
            let why = "the process was killed while it was being set up (is the memory limit large \
                       enough?)";
            return Err(Error::internal(why));
        };
        match message.tag {
            Tag::Terminal if terminal.is_none() => terminal = message.fds.into_iter().next(),
            Tag::Ready => return Ok(terminal),
            Tag::Failed => return Err(failure(&message.payload)),
            tag => return Err(Error::internal(format!("{tag:?} came from the new process"))),
        }
    }
}

/// The error of a channel to a process, with what there is to do when it does not answer.
fn unheard(e: io::Error, what: &str) -> Error {
    if !channel::timed_out(&e) {
        return Error::internal(format!("{what}: {}", crate::error::reason(&e)));
    }
    Error::internal(format!(
        "{what}: no answer in time (has a process of the container stopped it, or does a file system \
         of the container not answer?)"
    ))
}

/// The error that a process reported before it ended.
fn failure(json: &[u8]) -> Error {
    serde_json::from_slice(json).unwrap_or_else(|e| Error::internal(e.to_string()))
}

/// Lets a process call `execve` and waits for the outcome. Blocks meanwhile.
///
/// # Errors
///
/// Why `execve` failed. The process is then dead, or about to exit by itself.
pub(crate) fn start(channel: &Channel, pidfd: &OwnedFd) -> Result<()> {
    match channel.send(Tag::Start, &[], &[]) {
        Err(e) if is_gone(&e) => Err(Error::state("the process has ended before it was started")),
        sent => match sent.and_then(|()| channel.receive()) {
            // Closed by execve, or by a signal that came first and that the exit status will tell.
            Ok(None) => Ok(()),
            Ok(Some(message)) => Err(failure(&message.payload)),
            Err(e) => {
                kill(pidfd);
                Err(unheard(e, "start the process"))
            }
        },
    }
}

/// Whether the other end of the channel has been closed.
fn is_gone(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

const BIRTH: &str = "start the process of the container";

/// The error of a failed birth.
fn unborn(e: io::Error) -> Error {
    let hint = match e.raw_os_error() {
        Some(libc::EAGAIN) => " (the container's linux.resources.pids limit is reached)",
        _ => "",
    };
    Error::internal(format!("{BIRTH}: {}{hint}", crate::error::reason(&e)))
}

fn born(
    reaper: &Reaper,
    launch: &Launch<'_>,
    channel: &OwnedFd,
) -> Result<(i32, OwnedFd, ExitReceiver)> {
    let context = || BIRTH;
    let cgroup = launch.cgroup.dir();
    match &launch.birth {
        Birth::New { namespaces, linux, shared, .. } => {
            let user = namespaces.has(NamespaceKind::User);
            let gate =
                if user { Some(pipe_with(PipeFlags::CLOEXEC).context(context)?) } else { None };
            let gate_fds = gate.as_ref().map(|(read, write)| (read.as_raw_fd(), write.as_raw_fd()));
            let flags = namespaces.clone_flags();
            let clone = || reaper.spawn(|| clone_init(flags, cgroup.as_fd(), channel, gate_fds));
            let (pid, pidfd, exit) = in_namespaces_of(shared, clone)?;
            if let Some((_, open)) = gate {
                let opened = namespaces::map_ids(pid, linux)
                    .and_then(|()| rustix::io::write(&open, &[1]).context(context));
                if let Err(e) = opened {
                    // Another process that is just being born may hold the gate as well, so closing
                    // it would not do.
                    kill(&pidfd);
                    return Err(e);
                }
            }
            Ok((pid, pidfd, exit))
        }
        Birth::Joining { namespaces, init, init_pid, group } => {
            let join = namespaces.has(NamespaceKind::Pid).then_some(*init);
            let clone =
                |cgroup: BorrowedFd<'_>| reaper.spawn(|| clone_init(0, cgroup, channel, None));
            let born = |cgroup: BorrowedFd<'_>| match join {
                None => clone(cgroup),
                Some(init) => in_thread(|| {
                    move_into_thread_name_spaces(init, ThreadNameSpaceType::PROCESS_ID)?;
                    clone(cgroup)
                }),
            };
            if let Some(group) = group {
                return born(*group).map_err(|e| match e.raw_os_error() {
                    Some(libc::EBUSY) => Error::internal(format!(
                        "{BIRTH}: the cgroup that was asked for takes no processes, since its \
                         controllers are on for those below it"
                    )),
                    _ => unborn(e),
                });
            }
            match born(cgroup.as_fd()) {
                // The container has groups of its own below, so its top one takes no processes.
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                    born(cgroup_of(*init_pid)?.as_fd()).map_err(unborn)
                }
                result => result.map_err(unborn),
            }
        }
    }
}

/// Has `clone` make a process that inherits the namespaces of other containers.
fn in_namespaces_of<T: Send>(
    shared: &[Shared],
    clone: impl FnOnce() -> io::Result<T> + Send,
) -> Result<T> {
    if shared.is_empty() {
        return clone().map_err(unborn);
    }
    in_thread(|| {
        for Shared { container, init, bits } in shared {
            let flags = ThreadNameSpaceType::from_bits_retain(*bits);
            if let Err(e) = move_into_thread_name_spaces(init.as_fd(), flags) {
                return Ok(Err((e, container)));
            }
        }
        clone().map(Ok)
    })
    .map_err(unborn)?
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

/// Namespaces are a thread's own, so a thread of its own goes there and ends.
fn in_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, work)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread failed")))
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

/// `clone3` into a cgroup and namespaces, then `execve` of this very program.
fn clone_init(
    namespaces: u64,
    cgroup: BorrowedFd<'_>,
    channel: &OwnedFd,
    gate: Option<(RawFd, RawFd)>,
) -> io::Result<(i32, OwnedFd)> {
    let name = std::ffi::CString::new(INIT_NAME)?;
    let args = [name.as_ptr(), std::ptr::null()];
    let env = [std::ptr::null()];
    let flags = libc::CLONE_PIDFD as u64 | CLONE_INTO_CGROUP | CLONE_CLEAR_SIGHAND;
    let mut pidfd: libc::c_int = -1;
    // SAFETY: `clone_args` is plain data for which zeros mean that nothing is asked for.
    let mut clone: libc::clone_args = unsafe { std::mem::zeroed() };
    clone.flags = flags | namespaces;
    clone.pidfd = (&raw mut pidfd) as u64;
    clone.exit_signal = libc::SIGCHLD as u64;
    clone.cgroup = cgroup.as_raw_fd().unsigned_abs().into();
    let size = size_of::<libc::clone_args>();
    // SAFETY: without CLONE_VM and without a stack this is a fork: the child has a copy of this
    // memory. It runs `exec_init` only, which makes system calls and touches no lock.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &mut clone, size) };
    if pid == 0 {
        exec_init(channel.as_raw_fd(), gate, &args, &env);
    }
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has stored a new descriptor there, and nothing else owns it.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok((i32::try_from(pid).map_err(io::Error::other)?, pidfd))
}

/// Runs in the child of a process with threads: system calls only, no allocation, no lock.
fn exec_init(
    channel: RawFd,
    gate: Option<(RawFd, RawFd)>,
    args: &[*const libc::c_char; 2],
    env: &[*const libc::c_char; 1],
) -> ! {
    if let Some((read, write)) = gate {
        // Or the end of the agent would not end the wait.
        // SAFETY: this table is a copy, and nothing in this process uses the descriptor.
        unsafe { libc::close(write) };
        let mut byte = 0_u8;
        // SAFETY: one byte is read into a live variable.
        let n = unsafe { libc::read(read, (&raw mut byte).cast(), 1) };
        if n != 1 {
            // SAFETY: ends this process and runs nothing else of it.
            unsafe { libc::_exit(126) };
        }
        // The mappings are there: be root of the user namespace, or execve takes its
        // capabilities away. The C library's own calls would involve the other threads.
        // SAFETY: plain numbers are passed.
        unsafe { libc::syscall(libc::SYS_setresgid, 0, 0, 0) };
        // SAFETY: as above.
        unsafe { libc::syscall(libc::SYS_setresuid, 0, 0, 0) };
    }
    if channel == CHANNEL_FD {
        // SAFETY: clears close-on-exec of a descriptor of this process's own table.
        unsafe { libc::fcntl(channel, libc::F_SETFD, 0) };
    } else {
        // SAFETY: this table is a copy; whatever had the number before is not needed any more.
        unsafe { libc::dup2(channel, CHANNEL_FD) };
    }
    // SAFETY: C strings and lists of them that end with a null pointer, all made by the parent.
    unsafe { libc::execve(c"/proc/self/exe".as_ptr(), args.as_ptr(), env.as_ptr()) };
    // SAFETY: as above.
    unsafe { libc::_exit(127) }
}

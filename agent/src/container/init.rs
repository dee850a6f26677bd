//! Set-up of a container's process by itself, before it executes its program.
//!
//! The agent executes its own program again for this, in the new namespaces and the container's
//! cgroup. So all of it happens in a process with one thread and none of the agent's state.

use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, Uid};
use rustix::io::{Errno, FdFlags};
use rustix::process::{DumpableBehavior, ioctl_tiocsctty, set_dumpable_behavior, setsid, umask};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use super::channel::{Channel, InitRequest, Message, Tag};
use super::namespaces::{self, Namespaces};
use super::seccomp::SeccompFilter;
use super::spec::ContainerSpec;
use super::terminal::{self, Screen, Size, Terminal};
use super::{
    credentials, environment, executable, execve, hooks, rlimits, rootfs, scheduling, signals,
};
use crate::error::{Context as _, Error, Result};
use crate::oci::{Hook, HookState, NamespaceKind, ProcessSpec};

/// `argv[0]` of the agent's program when it is to become a container's process.
pub const INIT_NAME: &CStr = c"isopod-init";

/// Descriptor of the [`Channel`] to the agent.
pub(crate) const CHANNEL_FD: i32 = 3;

/// Becomes a container's process, as the agent asks over descriptor 3. Never returns.
pub fn run_init() -> ! {
    // SAFETY: the agent has put the channel there, and nothing else in this process uses it.
    let mut channel = Channel::new(unsafe { OwnedFd::from_raw_fd(CHANNEL_FD) });
    let e = match become_process(&mut channel) {
        Ok(never) => match never {},
        Err(e) => e,
    };
    if let Ok(json) = serde_json::to_vec(&e) {
        // An error here means that the agent is gone, so there is nobody to report to.
        let _ = channel.send(Tag::Failed, &json, &[]);
    }
    std::process::exit(128)
}

fn become_process(channel: &mut Channel) -> Result<Infallible> {
    rustix::io::fcntl_setfd(channel.as_fd(), FdFlags::CLOEXEC)
        .context(|| "mark the channel close-on-exec")?;
    signals::end_on_signals();
    umask(Mode::empty());
    setsid().context(|| "start a session")?;
    let request = expect(channel, Tag::Request)?;
    let document = expect(channel, Tag::Document)?.payload;
    let mut fds = request.fds.into_iter();
    let request: InitRequest =
        serde_json::from_slice(&request.payload).map_err(|e| Error::internal(e.to_string()))?;
    let (inside, filter, screen) = match request {
        InitRequest::Create { cgroup, filter, screen, state } => {
            (enter_new_container(&document, Path::new(&cgroup), state)?, filter, screen)
        }
        InitRequest::Exec { namespaces, filter, personality, screen } => {
            let container = fds.next().ok_or_else(|| Error::internal("no pidfd was sent"))?;
            let inside = enter_container(&document, &container, namespaces)?;
            (Inside { personality, ..inside }, filter, screen)
        }
    };
    let Inside { process, terminal, namespaces, personality, further, start_hooks } = inside;
    let terminal = match terminal {
        Some(terminal) => Some(take_terminal(channel, terminal, &process, screen)?),
        None => None,
    };
    let mut stdio: Vec<OwnedFd> = fds.collect();
    let further_fds = stdio.split_off(if terminal.is_some() { 0 } else { stdio.len().min(3) });
    connect_stdio(terminal.as_ref(), &stdio, process.user.uid)?;
    drop((terminal, stdio));
    let further_fds = make_room(channel, further_fds)?;
    if let Some(personality) = personality {
        scheduling::set_personality(personality)?;
    }
    scheduling::apply(&process, further)?;
    // After the change of user the passwd file may be out of reach.
    let env = environment::complete(&process.env, process.user.uid, Path::new("/etc/passwd"));
    let program = Program::prepare(&process, &env, namespaces, filter)?;
    // In a pod whose containers share processes this process inherits orphans, until it is started. A
    // holder never is.
    signals::ignore_children();
    channel.send(Tag::Ready, &[], &[]).context(|| "report to the agent")?;
    expect(channel, Tag::Start)?;
    signals::heed_children();
    if let Some((hooks, state)) = start_hooks {
        hooks::run("hooks.startContainer", &hooks, &env, state, "created")?;
    }
    program.execute(&further_fds)
}

fn expect(channel: &Channel, tag: Tag) -> Result<Message> {
    match channel.receive().context(|| "read from the agent")? {
        Some(message) if message.tag == tag => Ok(message),
        Some(message) => {
            Err(Error::internal(format!("the agent sent {:?} instead of {tag:?}", message.tag)))
        }
        None => Err(Error::internal("the agent has closed the channel")),
    }
}

/// Settings that are known once this process is inside the container.
struct Inside {
    process: ProcessSpec,
    terminal: Option<Terminal>,
    namespaces: Namespaces,
    personality: Option<u32>,
    /// True for any process but the container's first.
    further: bool,
    /// Hooks that run just before the program, with their state object.
    start_hooks: Option<(Vec<Hook>, HookState)>,
}

fn enter_new_container(json: &[u8], cgroup: &Path, state: Option<HookState>) -> Result<Inside> {
    let spec = ContainerSpec::parse(json)?;
    namespaces::set_up(&spec.spec, &spec.linux, spec.namespaces)?;
    hide()?;
    let (personality, namespaces) = (spec.personality()?, spec.namespaces);
    let hooks = spec.spec.hooks.clone().unwrap_or_default();
    let given = |hooks: &[Hook]| match &state {
        None if !hooks.is_empty() => Err(Error::internal("hooks were sent without a state object")),
        state => Ok(state.clone().filter(|_| !hooks.is_empty())),
    };
    let create = given(&hooks.create_container)?;
    let start = given(&hooks.start_container)?;
    let terminal = rootfs::enter(&spec, cgroup, || match create {
        Some(state) => {
            let env = &spec.process.env;
            hooks::run("hooks.createContainer", &hooks.create_container, env, state, "creating")
        }
        None => Ok(()),
    })?;
    let start_hooks = start.map(|state| (hooks.start_container, state));
    let process = spec.process;
    Ok(Inside { process, terminal, namespaces, personality, further: false, start_hooks })
}

fn enter_container(json: &[u8], container: &OwnedFd, namespaces: Namespaces) -> Result<Inside> {
    let process = super::spec::parse_process(json)?;
    hide()?;
    let flags = ThreadNameSpaceType::from_bits_retain(namespaces.join_flags());
    move_into_thread_name_spaces(container.as_fd(), flags)
        .context(|| "enter the namespaces of the container")?;
    if namespaces.has(NamespaceKind::User) {
        become_root()?;
    }
    let terminal = if process.terminal {
        let root = super::path::open_in_guest("/", OFlags::PATH).context(|| "open /")?;
        Some(Terminal::open(root.as_fd())?)
    } else {
        None
    };
    let start_hooks = None;
    Ok(Inside { process, terminal, namespaces, personality: None, further: true, start_hooks })
}

/// Makes the process undumpable. Until execve it runs the agent's program, and processes of the
/// container must not trace it or reach the guest through it.
fn hide() -> Result<()> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable).context(|| "make the process undumpable")
}

/// Becomes root of the container's user namespace, until the change to the process's own user.
fn become_root() -> Result<()> {
    let (uid, gid) = (Uid::ROOT, rustix::fs::Gid::ROOT);
    rustix::thread::set_thread_res_gid(gid, gid, gid)
        .and_then(|()| rustix::thread::set_thread_res_uid(uid, uid, uid))
        .context(|| "become root of the container's user namespace")
}

/// Makes the terminal the session's controlling terminal, and sends its master side to the agent.
fn take_terminal(
    channel: &Channel,
    terminal: Terminal,
    process: &ProcessSpec,
    screen: Screen,
) -> Result<OwnedFd> {
    let console_size = || {
        let size = process.console_size.as_ref()?;
        let (columns, rows) = (u16::try_from(size.width), u16::try_from(size.height));
        Some(Size { columns: columns.ok()?, rows: rows.ok()? })
    };
    if let Some(size) = screen.size.or_else(console_size) {
        terminal::resize(&terminal.master, size)?;
    }
    if screen.plain_newlines {
        terminal::keep_newlines(&terminal.slave)?;
    }
    ioctl_tiocsctty(&terminal.slave).context(|| "make the terminal the controlling one")?;
    channel
        .send(Tag::Terminal, &[], &[terminal.master.as_fd()])
        .context(|| "send the terminal to the agent")?;
    Ok(terminal.slave)
}

/// Moves the channel and the received descriptors above the numbers that the program's descriptors
/// get, from 3 on.
fn make_room(channel: &mut Channel, descriptors: Vec<OwnedFd>) -> Result<Vec<OwnedFd>> {
    if descriptors.is_empty() {
        return Ok(descriptors);
    }
    let context = || "move descriptors";
    let first = 3 + i32::try_from(descriptors.len()).unwrap_or(i32::MAX - 3);
    channel.move_to(first).context(context)?;
    let moved = descriptors.iter().map(|fd| rustix::io::fcntl_dupfd_cloexec(fd, first));
    moved.collect::<std::result::Result<_, _>>().context(context)
}

fn connect_stdio(terminal: Option<&OwnedFd>, stdio: &[OwnedFd], uid: u32) -> Result<()> {
    for target in 0..3 {
        let source = match (terminal, stdio.get(target)) {
            (Some(terminal), _) => terminal,
            (None, Some(fd)) => fd,
            (None, None) => return Err(Error::internal("a standard stream was not sent")),
        };
        let own = if is_null(source) { own_null() } else { None };
        let source = own.as_ref().unwrap_or(source);
        // Programs reopen /proc/self/fd/1, for which they have to own the file. Every user may open
        // /dev/null, and the streams whose owner cannot change.
        if !is_null(source) {
            match rustix::fs::fchown(source, Some(Uid::from_raw(uid)), None) {
                Ok(()) | Err(Errno::INVAL | Errno::PERM | Errno::ROFS) => {}
                Err(e) => return Err(e).context(|| "give the standard streams to process.user"),
            }
        }
        let target = i32::try_from(target).unwrap_or_default();
        // SAFETY: the targets are the standard streams, which no Rust value of this process owns.
        let result = unsafe { libc::dup2(source.as_raw_fd(), target) };
        if result < 0 {
            return Err(std::io::Error::last_os_error()).context(|| "connect standard streams");
        }
    }
    Ok(())
}

/// Opens the container's own /dev/null, if there is one. Through the guest's, a container could
/// change mode and owner of the guest's file.
fn own_null() -> Option<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NOCTTY;
    super::path::open_in_guest("/dev/null", flags).ok().filter(is_null)
}

fn is_null(fd: &OwnedFd) -> bool {
    let null = rustix::fs::makedev(1, 3);
    rustix::fs::fstat(fd).is_ok_and(|stat| stat.st_rdev == null)
}

/// Everything that `execve` needs, made while allocation and error reports are still possible.
struct Program {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
    umask: Mode,
    filter: Option<SeccompFilter>,
}

impl Program {
    /// Sets the process's limits and credentials, and finds its program.
    fn prepare(
        process: &ProcessSpec,
        env: &[String],
        namespaces: Namespaces,
        filter: Option<SeccompFilter>,
    ) -> Result<Self> {
        let args = &process.args;
        join_session_keyring();
        let limits = process.rlimits.as_deref().unwrap_or_default();
        rlimits::set_defaults(limits)?;
        // A process in a user namespace has no right to raise limits; the agent sets them.
        if !namespaces.has(NamespaceKind::User) {
            rlimits::set(None, limits)?;
        }
        // Root may enter directories that the user may not. The user alone can enter others, such
        // as some on a remote file system, so a failure here is retried after the change.
        let early = rustix::process::chdir(&process.cwd);
        credentials::apply(process, filter.is_some())?;
        if early.is_err() {
            rustix::process::chdir(&process.cwd)
                .context(|| format!("enter process.cwd {}", process.cwd.display()))?;
        }
        refuse_outside_cwd()?;
        if process.no_new_privileges == Some(true) {
            rustix::thread::set_no_new_privs(true).context(|| "set noNewPrivileges")?;
        }
        let path = executable::find(args.first().map_or("", String::as_str), env)?;
        let mask = process.user.umask.unwrap_or(0o022);
        let umask = Mode::from_raw_mode(mask);
        Ok(Self { path, args: to_c(args)?, env: to_c(env)?, umask, filter })
    }

    fn execute(self, further: &[OwnedFd]) -> Result<Infallible> {
        umask(self.umask);
        signals::reset();
        execve::close_on_exec();
        for (target, fd) in (3..).zip(further) {
            // SAFETY: the number's previous owner is not used any more. The channel and these
            // descriptors have higher numbers, and nothing but execve follows.
            if unsafe { libc::dup2(fd.as_raw_fd(), target) } < 0 {
                return Err(std::io::Error::last_os_error()).context(|| "pass on descriptors");
            }
        }
        let args = execve::pointers(&self.args);
        let env = execve::pointers(&self.env);
        // The filter is loaded last, so that a profile has to allow nothing but execve.
        if let Some(filter) = &self.filter {
            filter.load().context(|| "load the filter of linux.seccomp")?;
        }
        // SAFETY: the path is a C string, and the lists are arrays of C strings that end with a
        // null pointer. All of them live across the call.
        unsafe { libc::execve(self.path.as_ptr(), args.as_ptr(), env.as_ptr()) };
        Err(executable::exec_failed(&self.path, &std::io::Error::last_os_error()))
    }
}

/// Refuses a working directory outside the root, which would be a way out of the container.
/// getcwd(2) returns no absolute path for such a directory.
fn refuse_outside_cwd() -> Result<()> {
    let cwd = rustix::process::getcwd(Vec::new()).context(|| "read the working directory")?;
    if cwd.to_bytes().starts_with(b"/") {
        return Ok(());
    }
    Err(Error::internal("process.cwd is outside of the container's root"))
}

/// Joins a new session keyring, so that containers do not share keys. The error of a kernel without
/// keys is ignored.
fn join_session_keyring() {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    let anonymous: *const libc::c_char = std::ptr::null();
    // SAFETY: a null name asks for an anonymous keyring; no memory is passed.
    unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, anonymous) };
}

fn to_c(list: &[String]) -> Result<Vec<CString>> {
    execve::c_strings(list).map_err(|_| Error::invalid("process", "contains a NUL character"))
}

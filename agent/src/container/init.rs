//! What a container's process does before it becomes the program that it is for.
//!
//! The agent starts itself again for this, in the new namespaces and in the container's cgroup, so
//! that it all happens in a process with one thread and nothing of the agent's in it.

use std::convert::Infallible;
use std::ffi::CString;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::fs::{Mode, OFlags, Uid};
use rustix::io::{Errno, FdFlags};
use rustix::process::{DumpableBehavior, ioctl_tiocsctty, set_dumpable_behavior, setsid, umask};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use super::channel::{Channel, Message, Request, Tag};
use super::namespaces::{self, Namespaces};
use super::seccomp::Filter;
use super::spec::ContainerSpec;
use super::terminal::{self, Screen, Size, Terminal};
use super::{credentials, environment, executable, hooks, rlimits, rootfs, scheduling, signals};
use crate::error::{Context as _, Error, Result};
use crate::oci::{Hook, NamespaceKind, Process, State};

/// `argv[0]` of the agent's program when it is to become a container's process.
pub const INIT_NAME: &str = "isopod-init";

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
        // Without the agent there is nobody to tell.
        let _ = channel.send(Tag::Failed, &json, &[]);
    }
    std::process::exit(128)
}

fn become_process(channel: &mut Channel) -> Result<Infallible> {
    rustix::io::fcntl_setfd(channel.as_fd(), FdFlags::CLOEXEC).context(|| "mark the channel")?;
    signals::end_on_signals();
    umask(Mode::empty());
    setsid().context(|| "start a session")?;
    let request = expect(channel, Tag::Request)?;
    let document = expect(channel, Tag::Document)?.payload;
    let mut fds = request.fds.into_iter();
    let request: Request =
        serde_json::from_slice(&request.payload).map_err(|e| Error::internal(e.to_string()))?;
    let (inside, filter, screen) = match request {
        Request::Create { cgroup, filter, screen, state } => {
            (enter_new_container(&document, Path::new(&cgroup), state)?, filter, screen)
        }
        Request::Exec { namespaces, filter, personality, screen } => {
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
        scheduling::take_on(personality)?;
    }
    scheduling::apply(&process, further)?;
    // Before the passwd file may be out of reach for the process's user.
    let env = environment::complete(&process.env, process.user.uid, Path::new("/etc/passwd"));
    let program = Program::prepare(&process, &env, namespaces, filter)?;
    channel.send(Tag::Ready, &[], &[]).context(|| "report to the agent")?;
    expect(channel, Tag::Start)?;
    if let Some((hooks, state)) = start_hooks {
        hooks::run("hooks.startContainer", &hooks, &env, state, "created")?;
    }
    program.execute(&further_fds)
}

fn expect(channel: &Channel, tag: Tag) -> Result<Message> {
    match channel.receive().context(|| "hear from the agent")? {
        Some(message) if message.tag == tag => Ok(message),
        Some(message) => Err(Error::internal(format!("{:?} came instead of {tag:?}", message.tag))),
        None => Err(Error::internal("the agent has gone")),
    }
}

/// What is known once this process is inside the container.
struct Inside {
    process: Process,
    terminal: Option<Terminal>,
    namespaces: Namespaces,
    personality: Option<u32>,
    /// Not the container's first process.
    further: bool,
    /// Hooks to run just before the program, with what they read.
    start_hooks: Option<(Vec<Hook>, State)>,
}

fn enter_new_container(json: &[u8], cgroup: &Path, state: Option<State>) -> Result<Inside> {
    let spec = ContainerSpec::parse(json)?;
    namespaces::set_up(&spec.spec, &spec.linux, spec.namespaces)?;
    hide()?;
    let (personality, namespaces) = (spec.personality()?, spec.namespaces);
    let hooks = spec.spec.hooks.clone().unwrap_or_default();
    let given = |hooks: &[Hook]| match &state {
        None if !hooks.is_empty() => Err(Error::internal("hooks came without a state")),
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

/// Until execve this is the agent's program: processes of the container must not trace it or reach
/// through it into the guest.
fn hide() -> Result<()> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable).context(|| "become undumpable")
}

/// Root of the user namespace that was entered, until the process's own user is taken on.
fn become_root() -> Result<()> {
    let (uid, gid) = (Uid::ROOT, rustix::fs::Gid::ROOT);
    rustix::thread::set_thread_res_gid(gid, gid, gid)
        .and_then(|()| rustix::thread::set_thread_res_uid(uid, uid, uid))
        .context(|| "become root of the container's user namespace")
}

/// Makes the terminal the session's, and gives its master side to the agent.
fn take_terminal(
    channel: &Channel,
    terminal: Terminal,
    process: &Process,
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
        .context(|| "give the terminal to the agent")?;
    Ok(terminal.slave)
}

/// Moves the descriptors that the program gets from 3 on, and the channel, out of their way.
fn make_room(channel: &mut Channel, descriptors: Vec<OwnedFd>) -> Result<Vec<OwnedFd>> {
    if descriptors.is_empty() {
        return Ok(descriptors);
    }
    let context = || "make room for descriptors";
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
        // Programs open /proc/self/fd/1 anew, which needs them to own it. A stream that cannot
        // change its owner, and /dev/null, everybody may open.
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

/// The container's own /dev/null, if it has one: through the guest's it could change the mode and
/// owner of the guest's file.
fn own_null() -> Option<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NOCTTY;
    super::path::open_in_guest("/dev/null", flags).ok().filter(is_null)
}

fn is_null(fd: &OwnedFd) -> bool {
    let null = rustix::fs::makedev(1, 3);
    rustix::fs::fstat(fd).is_ok_and(|stat| stat.st_rdev == null)
}

/// Everything that `execve` needs, made while memory may still be allocated and errors reported.
struct Program {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
    umask: Mode,
    filter: Option<Filter>,
}

impl Program {
    /// Takes on the identity of the process and finds its program.
    fn prepare(
        process: &Process,
        env: &[String],
        namespaces: Namespaces,
        filter: Option<Filter>,
    ) -> Result<Self> {
        let args = &process.args;
        join_session_keyring();
        let limits = process.rlimits.as_deref().unwrap_or_default();
        rlimits::set_defaults(limits)?;
        // In a user namespace the agent does it.
        if !namespaces.has(NamespaceKind::User) {
            rlimits::set(None, limits)?;
        }
        // Before the change of user, for root, and after it, for directories that only the user
        // can enter, such as one on a remote file system.
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
        close_on_exec();
        for (target, fd) in (3..).zip(further) {
            // SAFETY: whatever else has the number is not used any more: channel and descriptors are
            // above, and nothing but execve follows.
            if unsafe { libc::dup2(fd.as_raw_fd(), target) } < 0 {
                return Err(std::io::Error::last_os_error()).context(|| "pass on descriptors");
            }
        }
        let args = pointers(&self.args);
        let env = pointers(&self.env);
        // Last, so that a profile has to allow nothing but execve.
        if let Some(filter) = &self.filter {
            filter.load().context(|| "load the filter of linux.seccomp")?;
        }
        // SAFETY: the path is a C string and the lists are arrays of C strings that end with a
        // null pointer; all of them live across the call.
        unsafe { libc::execve(self.path.as_ptr(), args.as_ptr(), env.as_ptr()) };
        Err(executable::exec_failed(&self.path, &std::io::Error::last_os_error()))
    }
}

/// A working directory outside of the root would be a way out: the kernel shows one with this
/// prefix.
fn refuse_outside_cwd() -> Result<()> {
    let cwd = rustix::process::getcwd(Vec::new()).context(|| "look at process.cwd")?;
    if cwd.to_bytes().starts_with(b"/") {
        return Ok(());
    }
    Err(Error::internal("process.cwd is outside of the container's root"))
}

/// Keys of one container are none of another's. Kernels without keys have none to protect.
fn join_session_keyring() {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    let anonymous: *const libc::c_char = std::ptr::null();
    // SAFETY: a null name asks for an anonymous keyring; no memory is passed.
    unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, anonymous) };
}

/// A descriptor of the guest that got this far must not get into the container.
pub(super) fn close_on_exec() {
    // SAFETY: this marks descriptors only; it closes none that is in use.
    unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC.cast_signed()) };
}

fn to_c(list: &[String]) -> Result<Vec<CString>> {
    list.iter()
        .map(|text| CString::new(std::ffi::OsStr::new(text).as_bytes()))
        .collect::<std::result::Result<_, _>>()
        .map_err(|_| Error::invalid("process", "contains a NUL character"))
}

pub(super) fn pointers(list: &[CString]) -> Vec<*const libc::c_char> {
    list.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect()
}

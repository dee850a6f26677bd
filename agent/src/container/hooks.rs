//! Hooks that run in the container's namespaces.
//!
//! createContainer hooks still see the guest's file systems. startContainer hooks run in the
//! container, as its own process would.
//!
//! A hook is a child of the container's first process, which is still the agent's program and has
//! one thread. A plain fork is therefore safe.

use std::collections::VecDeque;
use std::ffi::CString;
use std::io::Write as _;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use isopod_protocol::text::seconds;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Access, AtFlags, CWD, MemfdFlags, Mode, OFlags, SeekFrom, memfd_create};
use rustix::io::{Errno, retry_on_intr};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, WaitStatus, kill_process_group, pidfd_open, waitpid,
};

use super::{execve, signals};
use crate::error::{Context as _, Error, Result};
use crate::oci::{Hook, HookState};

/// Bytes of a hook's output that are kept, the last ones.
const MAX_OUTPUT: usize = 2048;

/// Reads from the pipe of a hook that has ended: enough for a full pipe, yet bounded.
const MAX_PIPE_READS: usize = 64;

/// Refuses a hook with a relative path or a timeout of 0.
pub(crate) fn check(field: &str, hooks: &[Hook]) -> Result<()> {
    for (index, hook) in hooks.iter().enumerate() {
        if !hook.path.is_absolute() {
            return Err(Error::invalid(format!("{field}[{index}].path"), "not an absolute path"));
        }
        if hook.timeout == Some(0) {
            return Err(Error::invalid(format!("{field}[{index}].timeout"), "not more than 0"));
        }
    }
    Ok(())
}

/// Longest time of all these hooks together. `None` if one of them has no timeout.
pub(crate) fn time_limit(hooks: &[Hook]) -> Option<Duration> {
    let limits = hooks.iter().map(|hook| hook.timeout.map(Duration::from_secs));
    limits.reduce(|sum, limit| sum?.checked_add(limit?)).unwrap_or(Some(Duration::ZERO))
}

/// Runs hooks one after another, up to the first that fails. A hook without its own environment
/// gets `env`.
pub(crate) fn run(
    field: &str,
    hooks: &[Hook],
    env: &[String],
    mut state: HookState,
    status: &str,
) -> Result<()> {
    // The container's own view of the pid (runtime-spec, "State").
    state.pid = rustix::process::getpid().as_raw_nonzero().get();
    status.clone_into(&mut state.status);
    let state = serde_json::to_vec(&state).map_err(|e| Error::internal(e.to_string()))?;
    for (index, hook) in hooks.iter().enumerate() {
        let name = format!("{field}[{index}] ({})", hook.path.display());
        run_one(&name, hook, env, &state)?;
    }
    Ok(())
}

fn run_one(name: &str, hook: &Hook, env: &[String], state: &[u8]) -> Result<()> {
    let (pid, output) = spawn(name, hook, env, state)?;
    let mut said = VecDeque::new();
    let ended = wait(pid, &output, hook.timeout.map(Duration::from_secs), &mut said)
        .context(|| format!("wait for {name}"))?;
    let Some(status) = ended else {
        let limit = seconds(Duration::from_secs(hook.timeout.unwrap_or_default()));
        return Err(Error::internal(format!(
            "{name} was killed: it took longer than its timeout of {limit}"
        )));
    };
    let how = match (status.exit_status(), status.terminating_signal()) {
        (Some(0), _) => return Ok(()),
        (_, Some(signal)) => format!("was killed by signal {signal}"),
        (code, None) => format!("failed with exit status {}", code.unwrap_or_default()),
    };
    let said: Vec<u8> = said.into();
    let said = String::from_utf8_lossy(&said);
    let lines: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let colon = if lines.is_empty() { "" } else { ": " };
    Err(Error::internal(format!("{name} {how}{colon}{}", lines.join("; "))))
}

/// Starts a hook. Returns its pid, and the read end of the pipe for its output.
fn spawn(name: &str, hook: &Hook, env: &[String], state: &[u8]) -> Result<(Pid, OwnedFd)> {
    let what = || format!("run {name}");
    let program = HookProgram::of(hook, env)
        .ok_or_else(|| Error::invalid(name, "contains a NUL character"))?;
    let stdin = state_file(state).context(what)?;
    let (output, written) = pipe_with(PipeFlags::CLOEXEC).context(what)?;
    rustix::fs::fcntl_setfl(&output, OFlags::NONBLOCK).context(what)?;
    // execve closes this pipe; a failed execve sends its error number first.
    let (failure, report) = pipe_with(PipeFlags::CLOEXEC).context(what)?;
    // SAFETY: this process has one thread, so its copy is whole.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let errno = program.execute([stdin.as_fd(), written.as_fd(), written.as_fd()]);
        let _ = rustix::io::write(&report, &errno.to_ne_bytes());
        // SAFETY: ends this process and runs nothing else of it.
        unsafe { libc::_exit(127) };
    }
    if pid < 0 {
        return Err(std::io::Error::last_os_error()).context(what);
    }
    drop((stdin, written, report));
    let pid = Pid::from_raw(pid).ok_or_else(|| Error::internal(what()))?;
    let mut errno = [0; 4];
    match retry_on_intr(|| rustix::io::read(&failure, &mut errno)) {
        Ok(4) => {
            // The child exits at once.
            let _ = retry_on_intr(|| waitpid(Some(pid), WaitOptions::empty()));
            Err(not_run(name, &hook.path, i32::from_ne_bytes(errno)))
        }
        _ => Ok((pid, output)),
    }
}

fn state_file(state: &[u8]) -> std::io::Result<OwnedFd> {
    let mut file: std::fs::File = memfd_create("state", MemfdFlags::CLOEXEC)?.into();
    file.write_all(state)?;
    rustix::fs::seek(&file, SeekFrom::Start(0))?;
    Ok(file.into())
}

/// The error of a hook whose `execve` failed. If the file exists, ENOENT means a missing
/// interpreter or program loader.
fn not_run(name: &str, path: &Path, errno: i32) -> Error {
    let there = rustix::fs::accessat(CWD, path, Access::EXISTS, AtFlags::empty()).is_ok();
    if errno == libc::ENOENT && there {
        return Error::internal(format!(
            "{name} cannot be run: its interpreter or program loader is missing there \
             (createContainer hooks run in the guest, which has none of the host's libraries, so \
             they have to be static programs)"
        ));
    }
    let why = crate::error::reason(&std::io::Error::from_raw_os_error(errno)).to_lowercase();
    Error::internal(format!("{name} cannot be run: {why}"))
}

/// Waits until a hook has ended, whether or not its output has. After `limit` it kills the hook's
/// process group and returns `None`.
fn wait(
    pid: Pid,
    output: &OwnedFd,
    limit: Option<Duration>,
    said: &mut VecDeque<u8>,
) -> rustix::io::Result<Option<WaitStatus>> {
    let reap = || {
        let ended = retry_on_intr(|| waitpid(Some(pid), WaitOptions::empty()))?;
        ended.map(|(_, status)| status).ok_or(Errno::CHILD)
    };
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
    let mut open = true;
    loop {
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        let interest = if open { PollFlags::IN } else { PollFlags::empty() };
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN), PollFd::new(output, interest)];
        // A pipe without a writer is always ready.
        let count = if open { 2 } else { 1 };
        if retry_on_intr(|| poll(&mut fds[..count], left.as_ref()))? == 0 {
            let _ = kill_process_group(pid, Signal::KILL);
            reap()?;
            return Ok(None);
        }
        if !fds[0].revents().is_empty() {
            break;
        }
        open = keep(output, said);
    }
    // All output of the hook itself is in the pipe by now.
    for _ in 0..MAX_PIPE_READS {
        if !keep(output, said) {
            break;
        }
    }
    reap().map(Some)
}

/// Reads some of the output. Returns false if there is no more.
fn keep(output: &OwnedFd, said: &mut VecDeque<u8>) -> bool {
    let mut buffer = [0; 1024];
    let Ok(length @ 1..) = rustix::io::read(output, &mut buffer) else { return false };
    said.extend(&buffer[..length]);
    let excess = said.len().saturating_sub(MAX_OUTPUT);
    said.drain(..excess);
    true
}

/// A hook's program with its arguments exactly as given, and its environment.
struct HookProgram {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl HookProgram {
    fn of(hook: &Hook, env: &[String]) -> Option<Self> {
        let path = CString::new(hook.path.as_os_str().as_bytes()).ok()?;
        let mut args = execve::c_strings(&hook.args).ok()?;
        if args.is_empty() {
            args.push(path.clone());
        }
        let env = execve::c_strings(hook.env.as_deref().unwrap_or(env)).ok()?;
        Some(Self { path, args, env })
    }

    /// Executes the program in a new process. Returns the error number of the call that failed.
    fn execute(&self, stdio: [BorrowedFd<'_>; 3]) -> i32 {
        // In a process group of its own, the hook can be killed together with its children.
        let _ = rustix::process::setpgid(None, None);
        rustix::process::umask(Mode::from_raw_mode(0o022));
        for (target, source) in (0..).zip(stdio) {
            // SAFETY: the targets are the standard streams, which no Rust value of this process
            // owns.
            if unsafe { libc::dup2(source.as_raw_fd(), target) } < 0 {
                return errno();
            }
        }
        signals::reset();
        execve::close_on_exec();
        let args = execve::pointers(&self.args);
        let env = execve::pointers(&self.env);
        // SAFETY: the path is a C string, and the lists are arrays of C strings that end with a
        // null pointer. All of them live across the call.
        unsafe { libc::execve(self.path.as_ptr(), args.as_ptr(), env.as_ptr()) };
        errno()
    }
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or_default()
}

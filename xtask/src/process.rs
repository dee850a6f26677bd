//! Running other programs so that none of them outlives this one.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::thread::ScopedJoinHandle;

use anyhow::{Context as _, Result, anyhow, bail};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

/// Lines of a log that go into an error message.
const LOG_TAIL: usize = 50;

/// A command that the kernel ends when the calling thread ends, whatever ended it.
///
/// Call it from a thread that lives as long as the child shall: the main thread.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    bound_to_us(Command::new(program), Signal::SIGTERM)
}

/// As [`command`], with the signal that ends the child.
pub(crate) fn bound_to_us(mut command: Command, signal: Signal) -> Command {
    let parent = nix::unistd::getpid();
    let bind = move || {
        set_pdeathsig(signal)?;
        // The parent may have ended before the line above took effect.
        if nix::unistd::getppid() != parent {
            return Err(std::io::ErrorKind::BrokenPipe.into());
        }
        Ok(())
    };
    // SAFETY: between fork and exec `bind` only makes two system calls (prctl and getppid) and
    // touches nothing but its captured integers, so it is async-signal-safe.
    unsafe { command.pre_exec(bind) };
    command
}

/// Lets the child have `fds` under their numbers here. They close with the command; the children
/// of other threads never see them.
pub(crate) fn inheriting(mut command: Command, fds: Vec<OwnedFd>) -> Command {
    let keep = move || {
        for fd in &fds {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec `keep` only makes system calls (fcntl) on descriptors that it
    // owns, so it is async-signal-safe.
    unsafe { command.pre_exec(keep) };
    command
}

/// The result of a thread. A panic is an error too.
pub(crate) fn joined<T>(thread: ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().unwrap_or_else(|_| Err(anyhow!("a thread has panicked")))
}

/// Runs `command` to its end with its output in `log`; a failure shows the end of that log.
pub(crate) fn run_logged(command: &mut Command, log: &Path) -> Result<()> {
    if let Some(parent) = log.parent() {
        fs::create_dir_all(parent)
            .with_context(|| format!("cannot create {}", parent.display()))?;
    }
    let out = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let err = out.try_clone().context("cannot duplicate a descriptor")?;
    let status = command
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .status()
        .with_context(|| format!("cannot run {}", name(command)))?;
    if !status.success() {
        bail!(
            "{} failed ({status}); the end of {}:\n{}",
            name(command),
            log.display(),
            tail(log, LOG_TAIL)
        );
    }
    Ok(())
}

/// Runs `command` to its end and returns its standard output; a failure shows its standard error.
pub(crate) fn capture(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", name(command)))?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        bail!("{} failed ({}): {}", name(command), output.status, why.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The last `lines` lines of a file, or why they cannot be had.
pub(crate) fn tail(path: &Path, lines: usize) -> String {
    match fs::read(path) {
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            let all: Vec<&str> = text.lines().collect();
            all[all.len().saturating_sub(lines)..].join("\n")
        }
        Err(error) => format!("(cannot read it: {error})"),
    }
}

/// The exit status that a shell would give.
pub(crate) fn shell_status(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(127))
}

/// What to call a command in a message: its program and first arguments.
fn name(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().take(3).map(|arg| arg.to_string_lossy().into_owned()));
    words.join(" ")
}

//! Child processes that do not outlive this one.

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

/// Number of log lines in an error message.
const LOG_TAIL: usize = 50;

/// A command that the kernel ends with SIGTERM when the thread that starts it ends.
///
/// Start it from a thread that lives as long as the child shall, such as the main thread.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    bound_to_us(Command::new(program), Signal::SIGTERM)
}

/// Sets the signal that the child gets when the thread that starts it ends.
pub(crate) fn bound_to_us(mut command: Command, signal: Signal) -> Command {
    let parent = nix::unistd::getpid();
    let bind = move || {
        set_pdeathsig(signal)?;
        // The parent may have ended before prctl: then no signal comes.
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

/// Passes `fds` to the child under the same numbers.
///
/// Close-on-exec is cleared in the child only, so children of other threads do not inherit them.
/// The descriptors are closed here when the command is dropped.
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

/// Waits for a thread. Returns its result; a panic becomes an error.
pub(crate) fn joined<T>(thread: ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().unwrap_or_else(|_| Err(anyhow!("a thread has panicked")))
}

/// Runs `command` to its end, with its output in the file `log`.
///
/// An error has the last [`LOG_TAIL`] lines of the file.
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

/// Runs `command` to its end. Returns its standard output; an error has its standard error.
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

/// The last `lines` lines of a file, or the error of reading it.
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

/// Exit status as a shell gives it: 128 and the signal number for a killed process.
pub(crate) fn shell_status(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(127))
}

/// Name of a command for messages: its program and its first three arguments.
fn name(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy()];
    words.extend(command.get_args().take(3).map(|arg| arg.to_string_lossy()));
    shell_line(words)
}

/// Words as one line for a shell.
pub(crate) fn shell_line(words: impl IntoIterator<Item = impl AsRef<str>>) -> String {
    words.into_iter().map(|word| shell_word(word.as_ref())).collect::<Vec<_>>().join(" ")
}

/// `text` as one word for a shell, in quotes if it needs them.
pub(crate) fn shell_word(text: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"%+,-./:=@_".contains(&byte);
    if !text.is_empty() && text.bytes().all(is_plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_a_shell() {
        assert_eq!(shell_line(["sh", "-c", "echo a b", ""]), "sh -c 'echo a b' ''");
        assert_eq!(shell_word("/a-b/c.d"), "/a-b/c.d");
        assert_eq!(shell_word("it's"), r"'it'\''s'");
        assert_eq!(shell_word("$x"), "'$x'");
    }
}

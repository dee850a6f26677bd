//! The process of a hook on the host.

use std::{
    collections::VecDeque,
    ffi::CString,
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt, process::CommandExt},
    },
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
};

use oci_spec::runtime::Hook;
use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open},
};
use tokio::{
    io::{AsyncReadExt, unix::AsyncFd},
    net::unix::pipe,
};

use crate::{
    descriptor::{inherit_only, wait_for},
    engine::runtime_namespace::{RuntimeNamespace, own_environment},
    text::printable,
};

/// Most bytes of a hook's output to keep.
const MAX_OUTPUT_LEN: usize = 2048;

/// Most reads of the bytes left in the pipe: enough for all that the pipe can hold, but bounded.
const MAX_PIPE_READS: u32 = 64;

/// A running hook. Dropping it kills the hook and its process group.
pub(super) struct HookProcess {
    child: Child,
    pidfd: AsyncFd<OwnedFd>,
    reaped: bool,
    output: pipe::Receiver,
    tail: VecDeque<u8>,
}

impl HookProcess {
    pub(super) fn spawn(
        hook: &Hook,
        stdin: &File,
        bundle: &Path,
        away: Option<&RuntimeNamespace>,
    ) -> io::Result<Self> {
        let environment = away.map_or_else(own_environment, RuntimeNamespace::environment);
        let image = Image::of(hook, environment)?;
        let bundle = CString::new(bundle.as_os_str().as_bytes())?;
        let away = away.cloned();
        let (output, written) = io::pipe()?;
        let output = pipe::Receiver::from_owned_fd(output.into())?;
        let parent = rustix::process::getpid();
        let mut command = Command::new(hook.path());
        command.stdin(stdin.try_clone()?).stdout(written.try_clone()?).stderr(Stdio::from(written));
        // SAFETY: the closure makes system calls only. Everything that it uses was allocated before
        // the fork, so the closure allocates nothing and takes no lock.
        unsafe {
            command.pre_exec(move || {
                // A process group of its own, to be killed with its descendants. The death signal
                // ends the hook when nobody waits for it any more.
                rustix::process::setpgid(None, None)?;
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                if rustix::process::getppid() != Some(parent) {
                    return Err(Errno::SRCH.into());
                }
                if let Some(away) = &away {
                    away.enter()?;
                }
                // The bundle may have been removed before the container is deleted.
                if rustix::process::chdir(&*bundle).is_err() {
                    rustix::process::chdir(c"/")?;
                }
                inherit_only(&[])?;
                Err(image.execute())
            });
        }
        let mut child = command.spawn()?;
        let watch = |child: &Child| {
            let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
            // The child is not reaped before this process waits for it, so the pid is still its
            // own.
            wait_for(pidfd_open(pid.ok_or(Errno::SRCH)?, PidfdFlags::empty())?)
        };
        match watch(&child) {
            Ok(pidfd) => Ok(Self { child, pidfd, reaped: false, output, tail: VecDeque::new() }),
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(e)
            }
        }
    }

    /// Waits for the end of the process, not for that of its output: a hook may leave processes.
    pub(super) async fn wait(&mut self) -> io::Result<ExitStatus> {
        let mut buffer = [0; 1024];
        let mut open = true;
        loop {
            tokio::select! {
                biased;
                ended = self.pidfd.readable() => {
                    drop(ended?);
                    break;
                }
                read = self.output.read(&mut buffer), if open => match read {
                    Ok(length @ 1..) => keep(&mut self.tail, &buffer[..length]),
                    _ => open = false,
                }
            }
        }
        // The pipe has everything that the hook itself wrote.
        for _ in 0..MAX_PIPE_READS {
            match rustix::io::read(self.output.as_fd(), &mut buffer) {
                Ok(length @ 1..) => keep(&mut self.tail, &buffer[..length]),
                _ => break,
            }
        }
        let status = self.child.wait()?;
        self.reaped = true;
        Ok(status)
    }

    /// The last bytes of the hook's output, on one line.
    pub(super) fn said(&self) -> String {
        let bytes: Vec<u8> = self.tail.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
        printable(&lines.join("; "))
    }
}

impl Drop for HookProcess {
    fn drop(&mut self) {
        if self.reaped {
            return;
        }
        if let Some(group) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            // The hook is not reaped and still leads its group, so the group is its own.
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn keep(tail: &mut VecDeque<u8>, bytes: &[u8]) {
    tail.extend(bytes);
    let excess = tail.len().saturating_sub(MAX_OUTPUT_LEN);
    tail.drain(..excess);
}

/// A program with its arguments and environment, ready for execve(2).
struct Image {
    path: CString,
    /// NULL-terminated array of pointers into `_strings`.
    argv: Vec<*const libc::c_char>,
    envp: Vec<*const libc::c_char>,
    _strings: [Vec<CString>; 2],
}

// SAFETY: the pointers lead into strings that the image owns. The strings are neither changed nor
// moved in memory until the image is dropped.
unsafe impl Send for Image {}
// SAFETY: nothing is changed through a shared reference.
unsafe impl Sync for Image {}

impl Image {
    fn of(hook: &Hook, environment: Vec<CString>) -> io::Result<Self> {
        let path = CString::new(hook.path().as_os_str().as_bytes())?;
        let strings = |texts: &Option<Vec<String>>| -> io::Result<Vec<CString>> {
            let texts = texts.iter().flatten();
            texts.map(|text| CString::new(text.as_bytes()).map_err(io::Error::from)).collect()
        };
        let mut args = strings(hook.args())?;
        if args.is_empty() {
            args.push(path.clone());
        }
        let env = match hook.env() {
            Some(_) => strings(hook.env())?,
            None => environment,
        };
        let pointers = |strings: &[CString]| {
            let pointers = strings.iter().map(|text| text.as_ptr());
            pointers.chain(std::iter::once(std::ptr::null())).collect()
        };
        Ok(Self { argv: pointers(&args), envp: pointers(&env), path, _strings: [args, env] })
    }

    /// Executes the program. Returns only if this fails, with the reason.
    fn execute(&self) -> io::Error {
        // SAFETY: the path is NUL-terminated, and both arrays end with NULL and point to
        // NUL-terminated strings. `self` owns all of it.
        unsafe { libc::execve(self.path.as_ptr(), self.argv.as_ptr(), self.envp.as_ptr()) };
        io::Error::last_os_error()
    }
}

//! The parent of all processes of a test: see `isopod_tests::subreaper`.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};

use isopod_tests::subreaper::{End, Event, MAX_PACKET_LEN, Request, Spawn};
use nix::cmsg_space;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, send};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, setsid};

/// Serves requests on descriptor 0 until its other end closes. Then ends all descendants and
/// removes `dir`.
pub(crate) fn run(dir: &Path) -> io::Result<()> {
    // A signal that ends the test program must not end its subreaper, which cleans up. The signals
    // are blocked and not ignored, because children would inherit ignored ones.
    for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM] {
        SigSet::from(signal).thread_block()?;
    }
    setsid()?;
    set_child_subreaper(true)?;
    let chld = SigSet::from(Signal::SIGCHLD);
    chld.thread_block()?;
    let signals = SignalFd::with_flags(&chld, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    let socket = io::stdin();
    loop {
        let mut fds = [
            PollFd::new(socket.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            other => other?,
        };
        let asked = fds[0].any().unwrap_or(true);
        while signals.read_signal()?.is_some() {}
        while reap(Some(WaitPidFlag::WNOHANG))? {}
        if asked && !serve()? {
            break;
        }
    }
    end_descendants()?;
    remove(dir)
}

/// Removes the scope's directory, which exists only if the test could not remove it. Does not go
/// through mounts: the files behind them may belong to others.
fn remove(dir: &Path) -> io::Result<()> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    if mounts.contains(&*dir.to_string_lossy()) {
        return Err(io::Error::other(format!("{} holds mounts", dir.display())));
    }
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Serves one request. Returns `false` at the end of the stream.
fn serve() -> io::Result<bool> {
    let mut packet = vec![0; MAX_PACKET_LEN];
    let mut space = cmsg_space!([i32; 3]);
    let mut iov = [IoSliceMut::new(&mut packet)];
    let message = recvmsg::<()>(0, &mut iov, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let len = message.bytes;
    let mut streams: Vec<OwnedFd> = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            // SAFETY: the kernel has just made these descriptors for this process, and nothing else
            // knows their numbers.
            streams.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    if len == 0 {
        return Ok(false);
    }
    let answer = match serde_json::from_slice(&packet[..len])? {
        Request::Spawn(program) => match spawn(&program, streams) {
            Ok(pid) => Event::Started { pid },
            Err(e) => {
                Event::Failed { message: format!("cannot run {}: {e}", program.argv.join(" ")) }
            }
        },
        Request::Signal { pid, signal } => match send_signal(pid, signal) {
            Ok(()) => Event::Signalled { pid },
            Err(e) => Event::Failed { message: format!("cannot send a signal to {pid}: {e}") },
        },
    };
    report(&answer)?;
    Ok(true)
}

/// Sends a signal to a child. A collected child is no child any more, so its pid is an error.
fn send_signal(pid: i32, signal: i32) -> io::Result<()> {
    if !children()?.contains(&pid) {
        return Err(Errno::ESRCH.into());
    }
    Ok(kill(Pid::from_raw(pid), Signal::try_from(signal)?)?)
}

fn spawn(request: &Spawn, streams: Vec<OwnedFd>) -> io::Result<i32> {
    let [stdin, stdout, stderr]: [OwnedFd; 3] =
        streams.try_into().map_err(|_| io::Error::other("not three streams"))?;
    let (program, args) =
        request.argv.split_first().ok_or_else(|| io::Error::other("no program"))?;
    let mut command = Command::new(program);
    command.args(args).envs(&request.env);
    command.stdin(Stdio::from(stdin)).stdout(Stdio::from(stdout)).stderr(Stdio::from(stderr));
    unblock_in_child(&mut command);
    let child = command.spawn()?;
    i32::try_from(child.id()).map_err(io::Error::other)
}

/// Makes the child begin with no signal blocked, as from a shell.
fn unblock_in_child(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    // SAFETY: the closure makes one system call and touches no memory of the parent's, so it may
    // run between fork and exec.
    unsafe {
        command.pre_exec(|| Ok(SigSet::all().thread_unblock()?));
    }
}

/// Collects one ended child and reports it. Returns `false` when there is none.
fn reap(flags: Option<WaitPidFlag>) -> io::Result<bool> {
    let (pid, end) = match waitpid(None, flags) {
        Ok(WaitStatus::Exited(pid, status)) => (pid, End::Exited(status)),
        Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, End::Killed(signal as i32)),
        Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(false),
        Ok(_) | Err(Errno::EINTR) => return Ok(true),
        Err(e) => return Err(e.into()),
    };
    report(&Event::Ended { pid: pid.as_raw(), end })?;
    Ok(true)
}

fn report(event: &Event) -> io::Result<()> {
    let json = serde_json::to_vec(event)?;
    match send(io::stdin().as_raw_fd(), &json, MsgFlags::MSG_NOSIGNAL) {
        // The test has gone; the next read sees the end of the stream.
        Ok(_) | Err(Errno::EPIPE) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Kills children until none is left. The children of a killed child become children of this
/// process.
fn end_descendants() -> io::Result<()> {
    loop {
        for pid in children()? {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        if !reap(None)? {
            return Ok(());
        }
    }
}

fn children() -> io::Result<Vec<i32>> {
    let own = Pid::this().to_string();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let Ok(pid) = entry?.file_name().to_string_lossy().parse::<i32>() else { continue };
        let Ok(stat) = File::open(format!("/proc/{pid}/stat")).and_then(io::read_to_string) else {
            continue;
        };
        // The fields after the command's name, which may hold any character: state, parent.
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1));
        if parent == Some(own.as_str()) {
            found.push(pid);
        }
    }
    Ok(found)
}

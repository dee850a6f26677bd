//! A command that runs in the lab, in a session and a cgroup of its own.

use std::fs::{self, File};
use std::io::{ErrorKind, PipeReader, Read, Write as _, pipe};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{ChildStdin, Command, Stdio};
use std::thread;

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Run;
use super::init::CGROUP;
use super::port::{discard, remove_cgroup};
use super::wire::{Kind, push_frame};
use crate::process::shell_status;

/// Bytes read from a stream at a time.
const CHUNK: usize = 32 * 1024;

/// How long killed processes may take to go away, in milliseconds.
const KILL_TIME: u16 = 30_000;

/// Something of a command that can be waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stream {
    Stdin,
    Stdout,
    Stderr,
    Exit,
}

/// A running command.
#[derive(Debug)]
pub(super) struct Child {
    cgroup: PathBuf,
    stdin: Option<ChildStdin>,
    /// Input that the command has not taken yet.
    fed: Vec<u8>,
    /// No more input will follow.
    fed_all: bool,
    stdout: Option<File>,
    stderr: Option<File>,
    /// Gets the exit status as 4 bytes when the command has ended.
    exit: PipeReader,
    status: Option<i32>,
}

impl Child {
    /// Starts a command in a new cgroup called `name`.
    pub(super) fn start(run: &Run, name: &str) -> Result<Self> {
        let cgroup = PathBuf::from(CGROUP).join(format!("run-{name}"));
        fs::create_dir(&cgroup).with_context(|| format!("cannot create {}", cgroup.display()))?;
        Self::start_in(run, cgroup.clone()).inspect_err(|_| remove_cgroup(&cgroup))
    }

    fn start_in(run: &Run, cgroup: PathBuf) -> Result<Self> {
        let (program, args) = run.argv.split_first().context("there is no command")?;
        if !run.cwd.is_dir() {
            bail!("the working directory {} does not exist in the lab", run.cwd.display());
        }
        let procs = cgroup.join("cgroup.procs");
        let procs = File::options()
            .write(true)
            .open(&procs)
            .with_context(|| format!("cannot open {}", procs.display()))?;
        let mut command = Command::new(program);
        command.args(args).env_clear().envs(run.env.iter().map(|(name, value)| (name, value)));
        command.current_dir(&run.cwd);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let enter = move || {
            nix::unistd::write(&procs, b"0")?;
            nix::unistd::setsid()?;
            Ok(())
        };
        // SAFETY: between fork and exec `enter` only makes two system calls (write and setsid) on a
        // descriptor that it owns and static data, so it is async-signal-safe.
        unsafe { command.pre_exec(enter) };
        let mut child = command.spawn().with_context(|| format!("cannot run {program}"))?;

        let stdin = child.stdin.take();
        let stdout = child.stdout.take().map(|stream| File::from(OwnedFd::from(stream)));
        let stderr = child.stderr.take().map(|stream| File::from(OwnedFd::from(stream)));
        for fd in [
            stdin.as_ref().map(AsFd::as_fd),
            stdout.as_ref().map(AsFd::as_fd),
            stderr.as_ref().map(AsFd::as_fd),
        ]
        .into_iter()
        .flatten()
        {
            fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("cannot set up a pipe")?;
        }
        let (exit, mut report) = pipe().context("cannot make a pipe")?;
        thread::spawn(move || {
            let status = child.wait().map_or(255, shell_status);
            report.write_all(&status.to_le_bytes())
        });
        Ok(Self {
            cgroup,
            stdin,
            fed: Vec::new(),
            fed_all: false,
            stdout,
            stderr,
            exit,
            status: None,
        })
    }

    /// Whether more input may be fed.
    pub(super) fn wants_input(&self) -> bool {
        self.fed.is_empty()
    }

    /// Takes input for the command; none is its end.
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            self.fed_all = true;
        }
        self.fed.extend_from_slice(bytes);
        self.push_input();
    }

    fn push_input(&mut self) {
        let Some(stdin) = &mut self.stdin else {
            self.fed.clear();
            return;
        };
        while !self.fed.is_empty() {
            match stdin.write(&self.fed) {
                Ok(length) => drop(self.fed.drain(..length)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // The command has closed its standard input: nobody reads the rest.
                Err(_) => {
                    self.stdin = None;
                    self.fed.clear();
                    return;
                }
            }
        }
        if self.fed_all {
            self.stdin = None;
        }
    }

    /// What to wait for, given whether there is `room` for more output.
    pub(super) fn watched(&self, room: bool) -> Vec<(Stream, BorrowedFd<'_>, PollFlags)> {
        let mut watched = Vec::new();
        if let Some(stdin) = &self.stdin
            && !self.fed.is_empty()
        {
            watched.push((Stream::Stdin, stdin.as_fd(), PollFlags::POLLOUT));
        }
        let outputs = [(Stream::Stdout, &self.stdout), (Stream::Stderr, &self.stderr)];
        for (stream, file) in outputs {
            if let Some(file) = file
                && room
            {
                watched.push((stream, file.as_fd(), PollFlags::POLLIN));
            }
        }
        if self.status.is_none() {
            watched.push((Stream::Exit, self.exit.as_fd(), PollFlags::POLLIN));
        }
        watched
    }

    /// Moves what can be moved on a stream that is ready.
    pub(super) fn pump(&mut self, stream: Stream, output: &mut Vec<u8>) {
        match stream {
            Stream::Stdin => self.push_input(),
            Stream::Stdout => read_some(&mut self.stdout, Kind::Stdout, output),
            Stream::Stderr => read_some(&mut self.stderr, Kind::Stderr, output),
            Stream::Exit => {
                let mut status = [0; 4];
                let read = self.exit.read_exact(&mut status);
                self.status = Some(read.map_or(255, |()| i32::from_le_bytes(status)));
            }
        }
    }

    /// The exit status, once the command has ended and all that it wrote has been read. Without
    /// `room` for more output that cannot be told.
    pub(super) fn finished(&self, room: bool) -> Option<i32> {
        let status = self.status?;
        let streams = [&self.stdout, &self.stderr];
        let mut fds: Vec<PollFd<'_>> = streams
            .into_iter()
            .flatten()
            .map(|file| PollFd::new(file.as_fd(), PollFlags::POLLIN))
            .collect();
        let waiting = !fds.is_empty() && poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0);
        (room && !waiting).then_some(status)
    }

    /// Lets go of a command that has ended, though processes that it left behind may live on.
    pub(super) fn release(&mut self) {
        self.stdin = None;
        for file in [self.stdout.take(), self.stderr.take()].into_iter().flatten() {
            if fcntl(&file, FcntlArg::F_SETFL(OFlag::empty())).is_ok() {
                discard(file);
            }
        }
        remove_cgroup(&self.cgroup);
    }

    /// Ends the command and all that it started, as far as it stayed in its cgroup.
    pub(super) fn kill(&mut self) {
        let kill = self.cgroup.join("cgroup.kill");
        match fs::write(&kill, "1") {
            Ok(()) => self.await_empty(),
            Err(error) => eprintln!("lab: cannot write {}: {error}", kill.display()),
        }
        self.release();
    }

    /// Waits until no process is left in the cgroup.
    fn await_empty(&self) {
        let events = self.cgroup.join("cgroup.events");
        while let Ok(mut file) = File::open(&events) {
            let mut text = String::new();
            // Reading arms the notification that POLLPRI then waits for.
            if file.read_to_string(&mut text).is_err() || text.contains("populated 0") {
                return;
            }
            let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
            if poll(&mut fds, KILL_TIME).is_ok_and(|n| n == 0) {
                eprintln!("lab: processes in {} do not end", self.cgroup.display());
                return;
            }
        }
    }
}

fn read_some(stream: &mut Option<File>, kind: Kind, output: &mut Vec<u8>) {
    let Some(file) = stream else { return };
    let mut chunk = vec![0; CHUNK];
    match file.read(&mut chunk) {
        Ok(length) if length > 0 => push_frame(output, kind, &chunk[..length]),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
        Ok(_) | Err(_) => *stream = None,
    }
}

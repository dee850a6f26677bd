//! A command running in the lab, in its own session and cgroup.

use std::fs::File;
use std::io::{self, ErrorKind, PipeReader, Read, Write as _, pipe};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{ChildStdin, Command, Stdio};
use std::thread;

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::cgroup;
use super::command::Run;
use super::wire::{Kind, push_frame};
use crate::process::shell_status;

/// Bytes read from a stream at a time.
const CHUNK: usize = 32 * 1024;

/// A stream or the end of a command, to wait for.
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
    /// Input that is not written to the command yet.
    fed: Vec<u8>,
    /// The caller has ended the input.
    fed_all: bool,
    stdout: Option<File>,
    stderr: Option<File>,
    /// Delivers the exit status as 4 bytes, little endian, when the command has ended.
    exit: PipeReader,
    status: Option<i32>,
}

impl Child {
    /// Starts a command in a new cgroup for `name`.
    pub(super) fn start(run: &Run, name: &str) -> Result<Self> {
        let cgroup = cgroup::create(name)?;
        Self::start_in(run, cgroup.clone()).inspect_err(|_| cgroup::remove(&cgroup))
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

    /// Tells if more input may be fed: all earlier input is written.
    pub(super) fn wants_input(&self) -> bool {
        self.fed.is_empty()
    }

    /// Takes input for the command. An empty slice ends the input.
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            self.fed_all = true;
        }
        self.fed.extend_from_slice(bytes);
        self.push_input();
    }

    /// Writes input until the pipe is full.
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
                // The command has closed its standard input: the rest is dropped.
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

    /// Descriptors and events to wait for. Outputs are left out without `room` for their bytes.
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

    /// Reads or writes a stream that is ready. Output becomes frames in `output`.
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

    /// Exit status, if the command has ended and all of its output has been read.
    ///
    /// Without `room` outputs are not read, so the result is none.
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

    /// Releases a command that has ended. Processes that it left behind live on.
    pub(super) fn release(&mut self) {
        self.stdin = None;
        for file in [self.stdout.take(), self.stderr.take()].into_iter().flatten() {
            if fcntl(&file, FcntlArg::F_SETFL(OFlag::empty())).is_ok() {
                discard(file);
            }
        }
        cgroup::remove(&self.cgroup);
    }

    /// Kills all processes in the cgroup of the command.
    pub(super) fn kill(&mut self) {
        cgroup::kill(&self.cgroup);
        self.release();
    }
}

/// Reads a piece of a stream into a frame. The end of the stream closes it.
fn read_some(stream: &mut Option<File>, kind: Kind, output: &mut Vec<u8>) {
    let Some(file) = stream else { return };
    let mut chunk = vec![0; CHUNK];
    match file.read(&mut chunk) {
        Ok(length) if length > 0 => push_frame(output, kind, &chunk[..length]),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
        Ok(_) | Err(_) => *stream = None,
    }
}

/// Reads `stream` to its end in the background.
///
/// A process that outlives the command may still write to the stream. Without a reader SIGPIPE
/// would kill it.
fn discard(mut stream: File) {
    thread::spawn(move || io::copy(&mut stream, &mut io::sink()));
}

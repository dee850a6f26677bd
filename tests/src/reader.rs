//! The reading end of a pipe, with bounded waits.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::deadline::DEADLINE;

/// The output of a process, read as it comes.
#[derive(Debug)]
pub struct Reader {
    file: File,
    /// Bytes read from the stream and not yet returned by [`Reader::line`].
    pending: Vec<u8>,
    ended: bool,
}

impl Reader {
    /// A pipe: its reader, and the end to write to.
    pub fn pipe() -> (Self, OwnedFd) {
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).expect("cannot make a pipe");
        (Self::new(read), write)
    }

    /// Reads from `fd`: a pipe or the master of a pseudo-terminal.
    pub fn new(fd: OwnedFd) -> Self {
        Self { file: fd.into(), pending: Vec::new(), ended: false }
    }

    /// The next line without its end; `None` at the end of the stream.
    pub fn line(&mut self) -> Option<String> {
        let until = Instant::now() + DEADLINE;
        loop {
            if let Some(end) = self.pending.iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                return Some(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
            if self.ended {
                let rest = std::mem::take(&mut self.pending);
                return (!rest.is_empty()).then(|| String::from_utf8_lossy(&rest).into_owned());
            }
            self.fill(until, "a line");
        }
    }

    /// Reads up to a line that contains `text`, and returns that line.
    pub fn line_with(&mut self, text: &str) -> String {
        let mut seen = Vec::new();
        while let Some(line) = self.line() {
            if line.contains(text) {
                return line;
            }
            seen.push(line);
        }
        panic!("the stream ended without {text:?} after {seen:#?}");
    }

    /// Everything up to the end of the stream. Fails the test when the end does not come, because a
    /// process holds the other end open.
    pub fn rest(&mut self) -> String {
        let until = Instant::now() + DEADLINE;
        while !self.ended {
            self.fill(until, "the end of a stream");
        }
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }

    /// The bytes written up to now. Does not wait for more.
    pub fn so_far(&mut self) -> String {
        while !self.ended && self.readable(PollTimeout::ZERO) {
            self.take();
        }
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }

    /// Waits for more bytes or the end of the stream, at most until the deadline.
    fn fill(&mut self, until: Instant, what: &str) {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        if !self.readable(timeout) {
            let seen = String::from_utf8_lossy(&self.pending);
            panic!("waited {DEADLINE:?} for {what}; this came: {seen:?}");
        }
        self.take();
    }

    fn readable(&self, timeout: PollTimeout) -> bool {
        let mut fds = [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, timeout).expect("poll") > 0
    }

    fn take(&mut self) {
        let mut buf = vec![0; 64 * 1024];
        match self.file.read(&mut buf) {
            // A terminal whose last slave has closed gives EIO instead of an end.
            Ok(0) => self.ended = true,
            Err(e) if e.raw_os_error() == Some(libc::EIO) => self.ended = true,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Ok(len) => self.pending.extend_from_slice(&buf[..len]),
            Err(e) => panic!("cannot read from a stream: {e}"),
        }
    }
}

/// For streams too long to keep. Bytes that [`Reader::line`] has left come first.
impl Read for Reader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.pending.is_empty() && !self.ended {
            self.fill(Instant::now() + DEADLINE, "more of a stream");
        }
        let len = buf.len().min(self.pending.len());
        buf[..len].copy_from_slice(&self.pending[..len]);
        self.pending.drain(..len);
        Ok(len)
    }
}

//! The streams of a process as containerd names them: fifos, files, or programs that log.
//!
//! | address | what is opened |
//! |---|---|
//! | a path, or `fifo://PATH` | the fifo that containerd has made |
//! | `file://PATH` | the file, to append to |
//! | `binary://PROGRAM?key=value` | a program that reads both outputs at descriptors 3 and 4, and is ready once it closes 5 or writes to it |
//! | `binary-v2://PROGRAM?key=value` | the same, ready only by a byte: without it the start has failed |
//!
//! A fifo is kept open in the other direction too. So a restart of containerd ends no process by a
//! closed pipe, and output that nobody has read yet waits in the fifo until the process is deleted.

use std::{
    fs::File,
    io::Read,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{fs::OpenOptionsExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
    thread,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FileType, Mode, OFlags, fcntl_setfl, fstat},
    io::Errno,
    pipe::{PipeFlags, pipe_with},
};

use crate::{
    engine::{Io, stdio::StandardStreams},
    error::{Error, Explain, Result},
    limits,
    process_id::ProcessId,
    terminal::Size,
    text::seconds,
};

/// Longest time for a logging program to say that it is ready, to read the rest of the outputs, and
/// to end when it is asked to.
const LOGGER_TIMEOUT: Duration = Duration::from_secs(10);

/// The addresses of a process's streams. An empty address is no stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Addresses {
    pub(super) stdin: String,
    pub(super) stdout: String,
    pub(super) stderr: String,
    pub(super) terminal: bool,
}

/// Ends of a process's streams that the shim keeps open.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// The writing end of the input's fifo. With it closed, the input ends when all others have
    /// closed theirs.
    input: Mutex<Option<OwnedFd>>,
    /// The reading ends of the outputs' fifos.
    _outputs: Vec<OwnedFd>,
    _logger: Option<Logger>,
}

impl Kept {
    /// Lets the input end.
    pub(super) fn close_input(&self) {
        // Whoever panicked has left it whole.
        drop(self.input.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

/// The task that a logging program is for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Of<'a> {
    pub(super) id: &'a str,
    pub(super) namespace: &'a str,
}

impl Addresses {
    /// Opens the streams. May block until a logging program is ready.
    ///
    /// # Errors
    ///
    /// If an address cannot be opened, or is of an unknown kind.
    pub(super) fn open(&self, of: Of<'_>, size: Option<Size>) -> Result<(Io, Kept)> {
        let mut kept = Kept::default();
        let mut streams =
            StandardStreams { terminal: self.terminal, size, ..StandardStreams::default() };
        if !self.stdin.is_empty() {
            let (reader, writer) = input(&self.stdin)?;
            streams.stdin = Some(reader);
            kept.input = Mutex::new(writer);
        }
        if let Some((ready, program)) = Ready::of(&self.stdout) {
            let (logger, stdout, stderr) = Logger::start(program, ready, of)?;
            streams.stdout = Some(stdout);
            streams.stderr = Some(stderr).filter(|_| !self.terminal);
            kept._logger = Some(logger);
        } else {
            let outputs = [(&self.stdout, true), (&self.stderr, !self.terminal)];
            let mut opened = outputs.into_iter().map(|(address, wanted)| {
                let Some(address) = Some(address).filter(|a| wanted && !a.is_empty()) else {
                    return Ok(None);
                };
                let (writer, reader) = output(address)?;
                kept._outputs.extend(reader);
                Ok(Some(writer))
            });
            streams.stdout = opened.next().transpose()?.flatten();
            streams.stderr = opened.next().transpose()?.flatten();
        }
        Ok((streams.into(), kept))
    }
}

/// Opens an input. Returns the writing end of a fifo too.
fn input(address: &str) -> Result<(OwnedFd, Option<OwnedFd>)> {
    let path = path_of(address)?;
    // The reading end first: so neither waits for the other.
    let reader = open(&path, OFlags::RDONLY | OFlags::NONBLOCK)?;
    let writer = match is_fifo(&reader) {
        true => Some(open(&path, OFlags::WRONLY | OFlags::NONBLOCK)?),
        false => None,
    };
    fcntl_setfl(&reader, OFlags::empty()).explain(|| format!("cannot open {}", path.display()))?;
    Ok((reader, writer))
}

/// Opens an output. Returns the reading end of a fifo too.
fn output(address: &str) -> Result<(OwnedFd, Option<OwnedFd>)> {
    if let Some(path) = address.strip_prefix("file://") {
        let path = Path::new(path);
        let what = || format!("cannot open {}", path.display());
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).explain(what)?;
        }
        let file = File::options().create(true).append(true).mode(0o644).open(path);
        return Ok((file.explain(what)?.into(), None));
    }
    let path = path_of(address)?;
    let what = || format!("cannot open {}", path.display());
    // The reading end first: so neither waits for the other.
    let reader = open(&path, OFlags::RDONLY | OFlags::NONBLOCK)?;
    let fifo = is_fifo(&reader);
    // Two outputs may be one file.
    let writer = open(&path, OFlags::WRONLY | OFlags::APPEND | OFlags::NONBLOCK)?;
    fcntl_setfl(&writer, OFlags::APPEND).explain(what)?;
    Ok((writer, Some(reader).filter(|_| fifo)))
}

/// The path of an address that is a path.
fn path_of(address: &str) -> Result<PathBuf> {
    let path = address.strip_prefix("fifo://").unwrap_or(address);
    if path.contains("://") || !path.starts_with('/') {
        return Err(Error::new(format!(
            "{address:?} is no place for a stream: fifo, file://, binary:// and \
             binary-v2:// are supported"
        )));
    }
    Ok(PathBuf::from(path))
}

fn open(path: &Path, flags: OFlags) -> Result<OwnedFd> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
        .explain(|| format!("cannot open {}", path.display()))
}

fn is_fifo(fd: &OwnedFd) -> bool {
    fstat(fd).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Fifo)
}

/// The sign by which a logging program says that it is ready, at its descriptor 5.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ready {
    /// A byte, or the end: also the end of a program that has failed.
    ByteOrEnd,
    /// A byte.
    Byte,
}

impl Ready {
    /// The sign and the program of an address that is a logging program's.
    fn of(address: &str) -> Option<(Self, &str)> {
        let kinds = [("binary://", Self::ByteOrEnd), ("binary-v2://", Self::Byte)];
        kinds.into_iter().find_map(|(kind, ready)| Some((ready, address.strip_prefix(kind)?)))
    }
}

/// A program that logs the outputs of a process. It ends by itself when both outputs have ended.
#[derive(Debug)]
struct Logger(Option<Child>);

impl Logger {
    /// Starts the program of `PROGRAM?key=value&key`. Returns the outputs that it reads.
    fn start(address: &str, sign: Ready, of: Of<'_>) -> Result<(Self, OwnedFd, OwnedFd)> {
        let (path, query) = address.split_once('?').unwrap_or((address, ""));
        let path = percent_decoded(path);
        let what = || format!("cannot start the logging program {path}");
        let pipe = || pipe_with(PipeFlags::CLOEXEC).explain(what);
        let ((out_reader, out_writer), (err_reader, err_writer)) = (pipe()?, pipe()?);
        let (ready, tell_ready) = pipe()?;
        let mut command = Command::new(&path);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            // The first value of each key, also if it is empty.
            command.args([key, value].map(|text| percent_decoded(&text.replace('+', " "))));
        }
        command
            .env("CONTAINER_ID", of.id)
            .env("CONTAINER_NAMESPACE", of.namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let given = [out_reader.as_raw_fd(), err_reader.as_raw_fd(), tell_ready.as_raw_fd()];
        // SAFETY: fcntl, dup2 and setrlimit are async-signal-safe. The closure allocates nothing and
        // takes no lock.
        unsafe {
            command.pre_exec(move || {
                limits::restore()?;
                give(given)
            })
        };
        let child = command.spawn().explain(what)?;
        drop((out_reader, err_reader, tell_ready));
        let mut logger = Self(Some(child));
        // containerd's logging package does the same at the other end.
        if !is_ready(&ready).explain(what)? {
            logger.end(Duration::ZERO);
            return Err(Error::new(format!(
                "{}: it was not ready within {}",
                what(),
                seconds(LOGGER_TIMEOUT)
            )));
        }
        let mut byte = [0];
        let read = File::from(ready).read(&mut byte).explain(what)?;
        if sign == Ready::Byte && read == 0 {
            logger.end(Duration::ZERO);
            return Err(Error::new(format!(
                "{}: it has closed CONTAINER_WAIT (descriptor 5), or has ended, without the byte \
                 that says that it is ready",
                what()
            )));
        }
        Ok((logger, out_writer, err_writer))
    }
}

impl Logger {
    /// Has a thread wait for the end of the program, which reads to the end of both outputs. After
    /// `patience` it is asked to end, and then killed.
    fn end(&mut self, patience: Duration) {
        let Some(mut child) = self.0.take() else { return };
        let process = i32::try_from(child.id()).ok().and_then(ProcessId::of);
        let work = move || {
            if process.is_some_and(|process| !process.wait(patience)) {
                let _ = process.map(|process| process.end(LOGGER_TIMEOUT));
            }
            child.wait()
        };
        if let Err(error) = thread::Builder::new().stack_size(64 << 10).spawn(work) {
            log::warn!("a logging program is not waited for: {error}");
        }
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        self.end(LOGGER_TIMEOUT);
    }
}

/// Waits until the other end of a pipe is written to or closed. False if that takes too long.
fn is_ready(pipe: &OwnedFd) -> rustix::io::Result<bool> {
    let limit = Timespec::try_from(LOGGER_TIMEOUT).ok();
    loop {
        match poll(&mut [PollFd::new(pipe, PollFlags::IN)], limit.as_ref()) {
            Err(Errno::INTR) => {}
            result => return result.map(|ready| ready > 0),
        }
    }
}

/// Puts three descriptors at 3, 4 and 5, without `CLOEXEC`. For use between `fork` and `execve`.
fn give(given: [i32; 3]) -> std::io::Result<()> {
    // Out of the way of the places first.
    let mut away = [0; 3];
    for (at, fd) in away.iter_mut().zip(given) {
        // SAFETY: takes numbers and returns one.
        *at = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 16) };
        if *at < 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    for (place, fd) in (3..).zip(away) {
        // SAFETY: takes numbers and returns one.
        if unsafe { libc::dup2(fd, place) } < 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Decodes `%41` to `A`. What is malformed stays as it is.
fn percent_decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = text.get(at + 1..at + 3).filter(|_| bytes[at] == b'%');
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                decoded.push(byte);
                at += 3;
            }
            None => {
                decoded.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use rustix::fs::{CWD, FileType as Kind, mknodat};

    use super::*;

    fn fifo(dir: &Path, name: &str) -> String {
        let path = dir.join(name);
        mknodat(CWD, &path, Kind::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        path.to_string_lossy().into_owned()
    }

    #[test]
    fn a_fifo_outlives_its_other_end() {
        let dir = tempfile::tempdir().unwrap();
        let address = fifo(dir.path(), "out");
        let (writer, reader) = output(&address).unwrap();
        // Nobody else reads, and nothing is lost.
        File::from(writer).write_all(b"kept").unwrap();
        let late = open(Path::new(&address), OFlags::RDONLY | OFlags::NONBLOCK).unwrap();
        let mut late = File::from(late);
        drop(reader);
        let mut text = String::new();
        late.read_to_string(&mut text).unwrap();
        assert_eq!(text, "kept");

        let address = fifo(dir.path(), "in");
        let (input, writer) = input(&address).unwrap();
        let mut client = File::options().write(true).open(&address).unwrap();
        client.write_all(b"typed").unwrap();
        drop(client);
        let mut bytes = [0; 5];
        let mut input = File::from(input);
        input.read_exact(&mut bytes).unwrap();
        // The end comes with the shim's own end of the fifo.
        let mut fds = [PollFd::new(&input, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        assert_eq!(poll(&mut fds, Some(&now)).unwrap(), 0);
        drop(writer);
        assert_eq!(input.read(&mut bytes).unwrap(), 0);
    }

    #[test]
    fn other_addresses_are_refused_by_name() {
        for address in ["npipe:///x", "ttrpc://x", "relative"] {
            let error = output(address).unwrap_err();
            assert!(error.message.contains(address), "{error}");
        }
        assert_eq!(percent_decoded("/a%20b%2F%zz%"), "/a b/%zz%");
    }

    #[test]
    fn a_logging_program_of_version_2_has_to_say_that_it_is_ready() {
        let open = |kind: &str, script: &str| {
            let stdout = format!("{kind}:///bin/sh?-c={}", script.replace(' ', "%20"));
            let of = Of { id: "web", namespace: "default" };
            Addresses { stdout, ..Addresses::default() }.open(of, None)
        };
        // Closing the descriptor is enough for the first version only.
        open("binary", "exec 5>%26-; cat <%263 <%264").unwrap();
        for script in ["exec 5>%26-; cat <%263 <%264", "true"] {
            let error = open("binary-v2", script).unwrap_err();
            assert!(error.message.contains("CONTAINER_WAIT"), "{error}");
        }
        open("binary-v2", "echo >%265; exec 5>%26-; cat <%263 <%264").unwrap();
    }
}

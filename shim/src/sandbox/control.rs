//! What other invocations of `isopod` ask of a sandbox process, over its control socket.
//!
//! Each message is a line of JSON. A connection carries requests one at a time, each answered by
//! [`Message::Done`] or [`Message::Failed`] ([`Request::Wait`] by [`Message::Ended`]). The connection
//! that `create` or `run` started the sandbox process with carries the same, after
//! [`Message::Created`] (or [`Message::Failed`]) said how the start went, and gets
//! [`Message::Ended`] at the end.
//!
//! What changes nothing is asked of the agent directly ([`super::inspect`]).

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use oci_spec::runtime::LinuxResources;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt::Timeout};
use serde::{Deserialize, Serialize};

use super::timeline::Timeline;
use crate::{
    error::{Error, Explain, Result},
    state::{CONTROL_SOCKET, Exit, StateDir},
    terminal::Size,
};

/// Version of the messages here. Raised by any change that one side alone cannot survive.
pub const CONTROL_VERSION: u32 = 1;

/// Longest message in either direction, in bytes.
pub const MAX_MESSAGE_LEN: usize = 64 * 1024;

/// What can be asked of a sandbox process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "request")]
pub enum Request {
    /// Start the container's process.
    Start,
    /// Send a signal to the container's process, or to all of the container's.
    Kill {
        /// 0 to 64; 0 only asks whether the process is there.
        signal: u32,
        /// To every process of the container.
        all: bool,
    },
    /// End the container and the microVM, whatever the state. Answered at once; done when the
    /// sandbox process ends.
    Destroy,
    /// Wait for the end of the container. Answered by [`Message::Ended`] when the microVM is gone and
    /// the sandbox process is about to be.
    Wait,
    /// Stop the container's processes where they are.
    Pause,
    /// Let them go on.
    Resume,
    /// Change the container's limits.
    Update {
        /// What is to change, with the processors of the host.
        resources: Box<LinuxResources>,
    },
    /// The terminal has a new size.
    Resize {
        /// The new size.
        size: Size,
    },
}

/// What a sandbox process says.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "message")]
pub enum Message {
    /// The container is created.
    Created,
    /// A request was carried out.
    Done,
    /// The start or a request failed.
    Failed {
        /// Why.
        error: Error,
    },
    /// The container has ended, and the sandbox process is about to.
    Ended(Box<Ended>),
}

/// How a container ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ended {
    /// The exit, unless it is unknown.
    pub exit: Option<Exit>,
    /// Why it is unknown.
    pub error: Option<Error>,
    /// When what happened.
    pub timeline: Timeline,
}

/// The answer to a request.
#[derive(Debug)]
pub enum Answer {
    /// Carried out.
    Done,
    /// The sandbox process is ending or has ended.
    Gone,
}

impl Answer {
    /// For who cannot do without: an error if the sandbox process is gone.
    ///
    /// # Errors
    ///
    /// If it is; `what` could not be done.
    pub fn done(self, what: impl std::fmt::Display) -> Result<()> {
        match self {
            Self::Done => Ok(()),
            Self::Gone => Err(Error::new(format!("{what}: its sandbox process has ended"))),
        }
    }
}

/// How long the answer to what is done at once may take.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a sandbox process may take to answer what it answers without asking its guest, before it
/// counts as one that cannot answer any more: stopped, or out of descriptors.
const LIFE_TIMEOUT: Duration = Duration::from_secs(5);

/// Asks the sandbox process behind `dir` for what it does at once, and waits for the answer.
///
/// # Errors
///
/// If the request was refused or failed, or the connection broke in an unexpected way.
pub fn ask(dir: &StateDir, request: &Request) -> Result<Answer> {
    ask_within(dir, request, Some(ANSWER_TIMEOUT))
}

/// As [`ask`], for what takes as long as `limit`, if there is one.
///
/// # Errors
///
/// As [`ask`].
pub fn ask_within(dir: &StateDir, request: &Request, limit: Option<Duration>) -> Result<Answer> {
    exchange(dir, request, limit)?.ok_or_else(|| {
        Error::new(format!(
            "the sandbox process of container {id} does not answer within {} seconds: `isopod \
             delete --force {id}` ends it",
            limit.unwrap_or_default().as_secs(),
            id = dir.path().file_name().unwrap_or_default().display()
        ))
    })
}

/// Asks for what a sandbox process answers without its guest. False if no answer comes, as from one that
/// is stopped or has no descriptor left for the connection.
///
/// # Errors
///
/// As [`ask`].
pub fn is_answered(dir: &StateDir, request: &Request) -> Result<bool> {
    exchange(dir, request, Some(LIFE_TIMEOUT)).map(|answer| answer.is_some())
}

/// Sends a request and receives the answer. None if there is none within `limit`.
fn exchange(dir: &StateDir, request: &Request, limit: Option<Duration>) -> Result<Option<Answer>> {
    use std::io::ErrorKind::{
        BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, TimedOut, WouldBlock,
    };
    let gone = |e: &std::io::Error| {
        matches!(e.kind(), NotFound | ConnectionRefused | ConnectionReset | BrokenPipe)
    };
    dir.check_protocols()?;
    let silent = |e: &std::io::Error| matches!(e.kind(), WouldBlock | TimedOut);
    let path = dir.path().join(CONTROL_SOCKET);
    let what = || format!("cannot talk to the sandbox process at {}", path.display());
    let mut socket = match connect(dir, limit) {
        Ok(socket) => socket,
        Err(e) if gone(&e) => return Ok(Some(Answer::Gone)),
        Err(e) if silent(&e) => return Ok(None),
        Err(e) => return Err(e).explain(what),
    };
    // A sandbox process that is stopped takes the connection but never answers.
    socket.set_read_timeout(limit).explain(what)?;
    match send(&mut socket, request) {
        Err(e) if gone(&e) => return Ok(Some(Answer::Gone)),
        Err(e) if silent(&e) => return Ok(None),
        result => result.explain(what)?,
    }
    match read_line(&mut BufReader::new(socket)) {
        Ok(None) => Ok(Some(Answer::Gone)),
        Err(e) if gone(&e) => Ok(Some(Answer::Gone)),
        Err(e) if silent(&e) => Ok(None),
        Err(e) => Err(e).explain(what),
        Ok(Some(line)) => match serde_json::from_str(&line).explain(what)? {
            Message::Done => Ok(Some(Answer::Done)),
            Message::Failed { error } => Err(error),
            Message::Created | Message::Ended(_) => Err(Error::new(format!(
                "{}: it answered with something else than was asked",
                what()
            ))),
        },
    }
}

/// Connects within `limit`: a sandbox process that accepts no connections lets their queue fill up, and
/// connect(2) waits for room in it as long as a send may take (unix(7)).
fn connect(dir: &StateDir, limit: Option<Duration>) -> std::io::Result<UnixStream> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::net::sockopt::set_socket_timeout(&socket, Timeout::Send, limit)?;
    let address = SocketAddrUnix::new(dir.short_path(CONTROL_SOCKET))?;
    loop {
        match rustix::net::connect(&socket, &address) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result?,
        }
    }
    Ok(socket.into())
}

/// A message as a line.
///
/// # Errors
///
/// If it cannot be written as JSON.
pub fn line(message: &impl Serialize) -> std::io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

/// Sends one message.
///
/// # Errors
///
/// If the connection is broken.
pub fn send(socket: &mut impl Write, message: &impl Serialize) -> std::io::Result<()> {
    socket.write_all(&line(message)?)
}

/// Reads one line, without its end; `None` at the end of the connection.
///
/// # Errors
///
/// If the connection is broken, or the line is longer than [`MAX_MESSAGE_LEN`].
pub fn read_line(socket: &mut impl BufRead) -> std::io::Result<Option<String>> {
    let mut line = String::new();
    socket.take(MAX_MESSAGE_LEN as u64).read_line(&mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    if line.pop() != Some('\n') {
        return Err(std::io::Error::other("a message is cut off or too long"));
    }
    Ok(Some(line))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Id;
    use std::os::unix::net::UnixListener;

    #[test]
    fn requests_are_answered_refused_or_find_nobody() {
        let root = tempfile::tempdir().unwrap();
        // Longer than a socket's address may be.
        let root = root.path().join("x".repeat(120));
        let dir = StateDir::create(&root, &Id::parse("one").unwrap()).unwrap();
        assert!(matches!(ask(&dir, &Request::Start), Ok(Answer::Gone)), "no socket");

        let listener = UnixListener::bind(dir.short_path(CONTROL_SOCKET)).unwrap();
        let answers = [
            Some(Message::Done),
            Some(Message::Failed { error: Error::new("no") }),
            Some(Message::Created),
            None,
        ];
        let server = std::thread::spawn(move || {
            for answer in answers {
                let (socket, _) = listener.accept().unwrap();
                let mut reader = BufReader::new(&socket);
                let request = read_line(&mut reader).unwrap().unwrap();
                let request: Request = serde_json::from_str(&request).unwrap();
                assert_eq!(request, Request::Kill { signal: 9, all: true });
                if let Some(answer) = answer {
                    send(&mut &socket, &answer).unwrap();
                }
            }
        });
        let request = Request::Kill { signal: 9, all: true };
        assert!(matches!(ask(&dir, &request), Ok(Answer::Done)));
        assert_eq!(ask(&dir, &request).unwrap_err().message, "no");
        assert!(ask(&dir, &request).unwrap_err().message.contains("something else"));
        assert!(matches!(ask(&dir, &request), Ok(Answer::Gone)));
        server.join().unwrap();
        assert!(matches!(ask(&dir, &request), Ok(Answer::Gone)), "a socket nobody listens on");
    }

    #[test]
    fn lines_are_bounded() {
        let mut long = std::io::Cursor::new(vec![b'a'; MAX_MESSAGE_LEN * 2]);
        assert!(read_line(&mut long).is_err());
        let mut cut = std::io::Cursor::new(b"abc".to_vec());
        assert!(read_line(&mut cut).is_err());
        let mut empty = std::io::Cursor::new(Vec::new());
        assert_eq!(read_line(&mut empty).unwrap(), None);
    }
}

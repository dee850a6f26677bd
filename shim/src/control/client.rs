//! Requests to a sandbox process from another invocation of `isopod`.

use std::{io::BufReader, os::unix::net::UnixStream, time::Duration};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt::Timeout};

use crate::{
    control::{
        message::{Message, Request, read_line, send},
        versions,
    },
    error::{Error, Explain, Result},
    state::{CONTROL_SOCKET, StateDir},
};

/// The answer to a request.
#[derive(Debug)]
pub enum Answer {
    /// The request was carried out.
    Done,
    /// The sandbox process is ending or has ended.
    Gone,
}

impl Answer {
    /// Turns [`Self::Gone`] into an error, for a caller that needs the sandbox process. `what`
    /// could not be done.
    pub fn done(self, what: impl std::fmt::Display) -> Result<()> {
        match self {
            Self::Done => Ok(()),
            Self::Gone => Err(Error::new(format!("{what}: its sandbox process has ended"))),
        }
    }
}

/// Longest time for the answer to a request that is carried out at once.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest time for an answer that needs no guest. After that the sandbox process counts as unable
/// to answer: stopped, or out of descriptors.
const LIFE_TIMEOUT: Duration = Duration::from_secs(5);

/// Sends a request that the sandbox process behind `dir` carries out at once, and waits for the
/// answer.
///
/// # Errors
///
/// If the request was refused or failed, or the connection broke. A sandbox process that is gone is
/// no error, but [`Answer::Gone`].
pub fn ask(dir: &StateDir, request: &Request) -> Result<Answer> {
    ask_within(dir, request, Some(ANSWER_TIMEOUT))
}

/// Like [`ask`], for a request that takes as long as `limit`, or for ever without a limit.
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

/// Sends a request that a sandbox process answers without its guest. Returns false if no answer
/// comes: the sandbox process is stopped, or has no descriptor left for the connection.
pub fn is_answered(dir: &StateDir, request: &Request) -> Result<bool> {
    exchange(dir, request, Some(LIFE_TIMEOUT)).map(|answer| answer.is_some())
}

/// Sends a request and receives the answer. `None` if there is no answer within `limit`.
fn exchange(dir: &StateDir, request: &Request, limit: Option<Duration>) -> Result<Option<Answer>> {
    use std::io::ErrorKind::{
        BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, TimedOut, WouldBlock,
    };
    let gone = |e: &std::io::Error| {
        matches!(e.kind(), NotFound | ConnectionRefused | ConnectionReset | BrokenPipe)
    };
    versions::check(dir)?;
    let silent = |e: &std::io::Error| matches!(e.kind(), WouldBlock | TimedOut);
    let path = dir.path().join(CONTROL_SOCKET);
    let what = || format!("cannot talk to the sandbox process at {}", path.display());
    let mut socket = match connect(dir, limit) {
        Ok(socket) => socket,
        Err(e) if gone(&e) => return Ok(Some(Answer::Gone)),
        Err(e) if silent(&e) => return Ok(None),
        Err(e) => return Err(e).explain(what),
    };
    // The kernel connects to a stopped sandbox process too, but no answer ever comes.
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
        Ok(Some(line)) => match serde_json::from_slice(&line).explain(what)? {
            Message::Done => Ok(Some(Answer::Done)),
            Message::Failed { error } => Err(error),
            Message::Created | Message::Ended(_) => Err(Error::new(format!(
                "{}: it answered with something else than was asked",
                what()
            ))),
        },
    }
}

/// Connects within `limit`. If a sandbox process accepts no connections, their queue fills up. Then
/// connect(2) waits for room in the queue, as long as a send may take (unix(7)).
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container_id::ContainerId;
    use std::os::unix::net::UnixListener;

    #[test]
    fn requests_are_answered_refused_or_find_nobody() {
        let root = tempfile::tempdir().unwrap();
        // Longer than the address of a socket may be.
        let root = root.path().join("x".repeat(120));
        let dir = StateDir::create(&root, &ContainerId::parse("one").unwrap()).unwrap();
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
                let request: Request = serde_json::from_slice(&request).unwrap();
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
}

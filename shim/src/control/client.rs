//! Calls to a sandbox process from another invocation of `isopod`.

use std::{io::BufReader, os::unix::net::UnixStream, time::Duration};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt::Timeout};

use crate::{
    container_id::ContainerId,
    control::{
        connection::Connection,
        message::{Call, Message, Verb, read_line, send},
    },
    engine::{ProcessInfo, Record, Request},
    error::{Error, Explain, Result},
    figures::Figures,
    state::{CONTROL_SOCKET, StateDir, versions},
    stats::Stats,
    text::seconds,
};

/// The answer to a request.
#[derive(Debug)]
pub(crate) enum Answer {
    /// The request was carried out.
    Done,
    /// The sandbox process is ending or has ended.
    Gone,
}

impl Answer {
    /// Turns [`Self::Gone`] into an error, for a caller that needs the sandbox process. `what`
    /// could not be done.
    pub(crate) fn done(self, what: impl std::fmt::Display) -> Result<()> {
        match self {
            Self::Done => Ok(()),
            Self::Gone => Err(Error::new(format!("{what}: its sandbox process has ended"))),
        }
    }
}

/// Longest time for the answer to a request that is carried out at once.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest time for the sandbox process of a pod to let go of a container whose process has gone:
/// the guest has to end it, and to forget it.
const LET_GO_TIMEOUT: Duration = Duration::from_secs(35);

/// Longest time for an answer that needs no guest. After that the sandbox process counts as unable
/// to answer: stopped, or out of descriptors.
const LIFE_TIMEOUT: Duration = Duration::from_secs(5);

/// Sends a request that the sandbox process of the container behind `dir` carries out at once, and
/// waits for the answer.
///
/// # Errors
///
/// If the request was refused or failed, or the connection broke. A container that has ended is no
/// error, but [`Answer::Gone`].
pub(crate) fn ask(dir: &StateDir, request: Request) -> Result<Answer> {
    ask_within(dir, request, Some(ANSWER_TIMEOUT))
}

/// Like [`ask`], for a request that takes as long as `limit`, or for ever without a limit.
pub(crate) fn ask_within(
    dir: &StateDir,
    request: Request,
    limit: Option<Duration>,
) -> Result<Answer> {
    match call(dir, Verb::Ask(request), limit)? {
        Some(Message::Done) => Ok(Answer::Done),
        Some(_) => Err(unexpected()),
        None => Ok(Answer::Gone),
    }
}

/// Asks for the container's processes. `None` if it has ended.
pub(crate) fn processes(dir: &StateDir) -> Result<Option<Vec<ProcessInfo>>> {
    match call(dir, Verb::Processes, Some(ANSWER_TIMEOUT))? {
        Some(Message::Processes(processes)) => Ok(Some(processes)),
        Some(_) => Err(unexpected()),
        None => Ok(None),
    }
}

/// Asks for the container's resource use. `None` if it has ended.
pub(crate) fn stats(dir: &StateDir) -> Result<Option<Box<Stats>>> {
    match call(dir, Verb::Stats, Some(ANSWER_TIMEOUT))? {
        Some(Message::Stats(stats)) => Ok(Some(stats)),
        Some(_) => Err(unexpected()),
        None => Ok(None),
    }
}

/// Asks for figures of the sandbox. `None` if it has ended.
pub(crate) fn figures(dir: &StateDir) -> Result<Option<Box<Figures>>> {
    match call(dir, Verb::Figures, Some(LIFE_TIMEOUT))? {
        Some(Message::Figures(figures)) => Ok(Some(figures)),
        Some(_) => Err(unexpected()),
        None => Ok(None),
    }
}

/// Sends a request that a sandbox process answers without its guest. Returns false if no answer
/// comes: the sandbox process is stopped, or has no descriptor left for the connection.
pub(crate) fn is_answered(dir: &StateDir, request: Request) -> Result<bool> {
    versions::check(dir)?;
    // Nobody refuses this one: it was not even heard.
    let always = request == Request::Destroy;
    let answer = exchange(dir, Verb::Ask(request), Some(LIFE_TIMEOUT))?;
    Ok(match answer {
        Some(Some(Message::Failed(_))) => !always,
        answer => answer.is_some(),
    })
}

/// Waits until the sandbox process of a pod has let go of a container whose own process has gone.
///
/// # Errors
///
/// If the sandbox process does not answer, or takes too long. It lets go as soon as it can.
pub(crate) fn wait_gone(dir: &StateDir) -> Result<()> {
    if !is_answered(dir, Request::Kill { signal: 0, all: false })? {
        let id = dir.container_name();
        return Err(Error::new(format!(
            "the sandbox process of the pod does not answer: container {id} stays in its microVM \
             until it does"
        )));
    }
    call(dir, Verb::Wait, Some(LET_GO_TIMEOUT)).map(drop)
}

/// Has a call carried out. `None` if the container has ended.
fn call(dir: &StateDir, verb: Verb, limit: Option<Duration>) -> Result<Option<Message>> {
    versions::check(dir)?;
    match exchange(dir, verb, limit)? {
        Some(Some(Message::Failed(error))) => Err(error),
        Some(answer) => Ok(answer),
        None => Err(Error::new(format!(
            "the sandbox process of container {id} does not answer within {}: `isopod \
             delete --force {id}` ends it",
            seconds(limit.unwrap_or_default()),
            id = dir.container_name()
        ))),
    }
}

fn unexpected() -> Error {
    Error::new("the sandbox process answered with something else than was asked")
}

/// Sends a call and receives the answer. `None` if there is no answer within `limit`, and
/// `Some(None)` if the container or its sandbox process is gone.
fn exchange(
    dir: &StateDir,
    verb: Verb,
    limit: Option<Duration>,
) -> Result<Option<Option<Message>>> {
    use std::io::ErrorKind::{
        BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, TimedOut, WouldBlock,
    };
    let gone = |e: &std::io::Error| {
        matches!(e.kind(), NotFound | ConnectionRefused | ConnectionReset | BrokenPipe)
    };
    let silent = |e: &std::io::Error| matches!(e.kind(), WouldBlock | TimedOut);
    let Some(sandbox) = sandbox_of(dir)? else { return Ok(Some(None)) };
    let container = ContainerId::parse(&dir.container_name())?;
    let path = sandbox.path().join(CONTROL_SOCKET);
    let what = || format!("cannot talk to the sandbox process at {}", path.display());
    let mut socket = match connect(&sandbox, limit) {
        Ok(socket) => socket,
        Err(e) if gone(&e) => return Ok(Some(None)),
        Err(e) if silent(&e) => return Ok(None),
        Err(e) => return Err(e).explain(what),
    };
    // The kernel connects to a stopped sandbox process too, but no answer ever comes.
    socket.set_read_timeout(limit).explain(what)?;
    match send(&mut socket, &Call { container, verb }) {
        Err(e) if gone(&e) => return Ok(Some(None)),
        Err(e) if silent(&e) => return Ok(None),
        result => result.explain(what)?,
    }
    match read_line(&mut BufReader::new(socket)) {
        Ok(None) => Ok(Some(None)),
        Err(e) if gone(&e) => Ok(Some(None)),
        Err(e) if silent(&e) => Ok(None),
        Err(e) => Err(e).explain(what),
        Ok(Some(line)) => {
            serde_json::from_slice(&line).map(|message| Some(Some(message))).explain(what)
        }
    }
}

/// Connects to the sandbox process of the container whose state directory is `dir`. The caller has
/// checked the versions.
///
/// # Errors
///
/// If the sandbox process is ending or gone, or is stopped.
pub(crate) async fn connect_to_sandbox(dir: &StateDir) -> Result<Connection> {
    let sandbox = sandbox_of(dir)?.ok_or_else(|| Error::new("its pod is gone"))?;
    Connection::connect(&sandbox).await
}

/// The state directory of the sandbox that a container lives in: its own, or that of its pod's first
/// container. `None` if the pod is gone.
fn sandbox_of(dir: &StateDir) -> Result<Option<StateDir>> {
    match Record::read(dir)?.and_then(|record| record.pod) {
        // While the process lives, the directory is its own. A holder removes it before its end.
        Some(pod) if pod.process.is_alive() => match StateDir::open_path(&pod.dir) {
            Err(_) if !pod.dir.exists() => Ok(None),
            opened => opened.map(Some),
        },
        Some(_) => Ok(None),
        None => StateDir::open_path(dir.path()).map(Some),
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
    use std::os::unix::net::UnixListener;

    #[test]
    fn requests_are_answered_refused_or_find_nobody() {
        let root = tempfile::tempdir().unwrap();
        // Longer than the address of a socket may be.
        let root = root.path().join("x".repeat(120));
        let dir = StateDir::create(&root, &ContainerId::parse("one").unwrap()).unwrap();
        assert!(matches!(ask(&dir, Request::Start), Ok(Answer::Gone)), "no socket");

        let listener = UnixListener::bind(dir.short_path(CONTROL_SOCKET)).unwrap();
        let answers = [
            Some(Message::Done),
            Some(Message::Failed(Error::new("no"))),
            Some(Message::Created),
            None,
        ];
        let server = std::thread::spawn(move || {
            for answer in answers {
                let (socket, _) = listener.accept().unwrap();
                let mut reader = BufReader::new(&socket);
                let request = read_line(&mut reader).unwrap().unwrap();
                let call: Call = serde_json::from_slice(&request).unwrap();
                assert_eq!(call.container.as_str(), "one");
                let Verb::Ask(request) = call.verb else { panic!("{:?}", call.verb) };
                assert_eq!(request, Request::Kill { signal: 9, all: true });
                if let Some(answer) = answer {
                    send(&mut &socket, &answer).unwrap();
                }
            }
        });
        let request = || Request::Kill { signal: 9, all: true };
        assert!(matches!(ask(&dir, request()), Ok(Answer::Done)));
        assert_eq!(ask(&dir, request()).unwrap_err().message, "no");
        assert!(ask(&dir, request()).unwrap_err().message.contains("something else"));
        assert!(matches!(ask(&dir, request()), Ok(Answer::Gone)));
        server.join().unwrap();
        assert!(matches!(ask(&dir, request()), Ok(Answer::Gone)), "a socket nobody listens on");
    }
}

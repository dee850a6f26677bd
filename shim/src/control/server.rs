//! The sandbox process's side of [`crate::control`]. It takes requests from connections and hands
//! them to the one task that owns the container's state.

use std::{
    collections::{HashMap, VecDeque},
    os::unix::net::UnixStream as StdUnixStream,
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, BufReader},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Mutex, mpsc, oneshot, watch},
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    control::message::{Ended, Message, Request, line, next_line},
    error::{Error, Explain, Result},
    state::{CONTROL_SOCKET, StateDir},
};

/// Longest time for answers that are on their way out when the sandbox process ends.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Pause after a failed accept. Descriptors have run out, and the connection that is next stays the
/// next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Most connections of one process at a time: each costs a descriptor. A client needs one.
const MAX_CONNECTIONS: u32 = 16;

/// Most requests of one connection that wait for the answer to an earlier request.
const MAX_AHEAD: usize = 16;

/// Listens on the control socket in `dir`.
pub(crate) fn listen(dir: &StateDir) -> Result<UnixListener> {
    UnixListener::bind(dir.short_path(CONTROL_SOCKET))
        .explain(|| format!("cannot listen at {}", dir.path().join(CONTROL_SOCKET).display()))
}

/// A request, and the channel for its answer. Dropping the channel closes the connection
/// unanswered: to the client this is the end of the sandbox.
#[derive(Debug)]
pub(crate) struct Command {
    pub(crate) request: Request,
    pub(crate) answer: oneshot::Sender<Result<()>>,
}

/// The connection to the command that launched this process.
#[derive(Debug)]
pub(crate) struct Launcher {
    reader: OwnedReadHalf,
    writer: Arc<Mutex<OwnedWriteHalf>>,
}

impl Launcher {
    /// Takes over the connection.
    pub(crate) fn new(socket: StdUnixStream) -> Result<Self> {
        let what = || "cannot use the connection to the command".to_owned();
        socket.set_nonblocking(true).explain(what)?;
        let (reader, writer) = UnixStream::from_std(socket).explain(what)?.into_split();
        Ok(Self { reader, writer: Arc::new(Mutex::new(writer)) })
    }

    /// Waits until the launching process has gone away. Before it has heard [`Message::Created`] it
    /// sends nothing, so anything to read is the end of the connection.
    pub(crate) async fn gone(&mut self) {
        let _ = self.reader.read(&mut [0]).await;
    }

    /// Sends a message. Returns false if the launching process is gone.
    pub(crate) async fn send(&self, message: &Message) -> bool {
        send(&self.writer, message).await
    }
}

/// The control socket and its connections.
#[derive(Debug)]
pub(crate) struct Server {
    commands: mpsc::Receiver<Command>,
    connections: JoinSet<()>,
    /// The container's end, once it has ended.
    closing: watch::Sender<Option<Ended>>,
    launcher: Arc<Mutex<OwnedWriteHalf>>,
}

impl Server {
    /// Serves the connections to `listener`, and the connection to the launching process.
    pub(crate) fn start(listener: UnixListener, launcher: Launcher) -> Self {
        let (sender, commands) = mpsc::channel(16);
        let (closing, closed) = watch::channel(None);
        let mut connections = JoinSet::new();
        let writer = Arc::clone(&launcher.writer);
        connections.spawn(serve(launcher.reader, launcher.writer, sender.clone(), closed.clone()));
        connections.spawn(accept(listener, sender, closed));
        Self { commands, connections, closing, launcher: writer }
    }

    /// Waits for the next request. Never returns when no more requests can come.
    pub(crate) async fn next(&mut self) -> Command {
        match self.commands.recv().await {
            Some(command) => command,
            None => std::future::pending().await,
        }
    }

    /// Leaves all further requests unanswered, and lets out the answers that are on their way.
    /// Tells the clients that wait, and the launching process, how the container ended. Returns
    /// false if the launching process is gone.
    pub(crate) async fn close(mut self, ended: Ended) -> bool {
        drop(self.commands);
        self.closing.send_replace(Some(ended.clone()));
        let all = async { while self.connections.join_next().await.is_some() {} };
        let _ = timeout(FLUSH_TIMEOUT, all).await;
        let last = Message::Ended(Box::new(ended));
        timeout(FLUSH_TIMEOUT, send(&self.launcher, &last)).await.unwrap_or(false)
    }
}

async fn accept(
    listener: UnixListener,
    commands: mpsc::Sender<Command>,
    mut closing: watch::Receiver<Option<Ended>>,
) {
    let mut connections = JoinSet::new();
    let mut clients = Clients::default();
    // One warning for each stretch of failures, not for each attempt.
    let mut failing = false;
    loop {
        tokio::select! {
            // A client that has connected before the end is to hear of the end.
            biased;
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    failing = false;
                    let Some(client) = clients.admit(&stream) else { continue };
                    let (reader, writer) = stream.into_split();
                    let writer = Arc::new(Mutex::new(writer));
                    let served = serve(reader, writer, commands.clone(), closing.clone());
                    connections.spawn(async move {
                        served.await;
                        client
                    });
                }
                Err(error) => {
                    if !failing {
                        log::warn!("cannot accept a connection to {CONTROL_SOCKET}: {error}");
                    }
                    failing = true;
                    tokio::select! {
                        () = sleep(ACCEPT_PAUSE) => {}
                        _ = closing.changed() => break,
                    }
                }
            },
            Some(ended) = connections.join_next() => {
                if let Ok(client) = ended {
                    clients.gone(client);
                }
            }
            _ = closing.changed() => break,
        }
    }
    drop(commands);
    while connections.join_next().await.is_some() {}
}

/// Number of open connections by the pid of the process that made them.
#[derive(Debug, Default)]
struct Clients(HashMap<i32, u32>);

impl Clients {
    /// Counts a connection. `None` if its process has too many connections.
    fn admit(&mut self, stream: &UnixStream) -> Option<i32> {
        // The pid is 0 for a process outside this pid namespace: all of these are one client.
        let pid = stream.peer_cred().ok()?.pid().unwrap_or(0);
        let open = self.0.entry(pid).or_default();
        if *open >= MAX_CONNECTIONS {
            let why = format!(
                "process {pid} has {open} connections to {CONTROL_SOCKET}, and gets no more"
            );
            let refusal = Message::Failed { error: Error::new(why) };
            if let Ok(line) = line(&refusal) {
                // The line fits into the buffer of a new socket.
                let _ = stream.try_write(&line);
            }
            return None;
        }
        *open += 1;
        Some(pid)
    }

    /// Forgets a connection.
    fn gone(&mut self, pid: i32) {
        if let Some(open) = self.0.get_mut(&pid) {
            *open -= 1;
            if *open == 0 {
                self.0.remove(&pid);
            }
        }
    }
}

/// The requests of a connection, in the order in which they were sent.
struct Requests {
    reader: BufReader<OwnedReadHalf>,
    /// The part of the next line that has been read so far.
    line: Vec<u8>,
    ahead: VecDeque<Vec<u8>>,
}

impl Requests {
    fn new(reader: OwnedReadHalf) -> Self {
        Self { reader: BufReader::new(reader), line: Vec::new(), ahead: VecDeque::new() }
    }

    /// The next request. `None` if the client is gone, or sends a line without an end. A cancelled
    /// call loses nothing.
    async fn next(&mut self) -> Option<Vec<u8>> {
        match self.ahead.pop_front() {
            Some(line) => Some(line),
            None => self.read().await,
        }
    }

    /// Waits until the client is gone, and keeps further requests for [`Self::next`]. A client that
    /// sends too many requests before it has its answers counts as gone.
    async fn gone(&mut self) {
        while self.ahead.len() < MAX_AHEAD {
            match self.read().await {
                Some(line) => self.ahead.push_back(line),
                None => return,
            }
        }
    }

    async fn read(&mut self) -> Option<Vec<u8>> {
        next_line(&mut self.reader, &mut self.line).await.ok().flatten()
    }
}

/// Carries out the requests of one connection, one at a time, until its client is gone. The last
/// request is carried out even if the client has gone.
async fn serve(
    reader: OwnedReadHalf,
    writer: Arc<Mutex<OwnedWriteHalf>>,
    commands: mpsc::Sender<Command>,
    mut closing: watch::Receiver<Option<Ended>>,
) {
    let mut requests = Requests::new(reader);
    loop {
        let line = tokio::select! {
            biased;
            line = requests.next() => line,
            _ = closing.changed() => return,
        };
        let Some(line) = line else { return };
        let result = match serde_json::from_slice(&line) {
            Ok(Request::Wait) => {
                let ended = tokio::select! {
                    biased;
                    ended = closing.wait_for(Option::is_some) => ended.ok().and_then(|e| e.clone()),
                    () = requests.gone() => None,
                };
                if let Some(ended) = ended {
                    send(&writer, &Message::Ended(Box::new(ended))).await;
                }
                return;
            }
            Ok(request) => {
                let (answer, answered) = oneshot::channel();
                if commands.send(Command { request, answer }).await.is_err() {
                    return;
                }
                tokio::select! {
                    biased;
                    answered = answered => match answered {
                        Ok(result) => result,
                        Err(_) => return,
                    },
                    () = requests.gone() => return,
                }
            }
            Err(e) => Err(Error::new(format!("the sandbox process cannot read a request: {e}"))),
        };
        let message = match result {
            Ok(()) => Message::Done,
            Err(error) => Message::Failed { error },
        };
        if !send(&writer, &message).await {
            return;
        }
    }
}

async fn send(writer: &Mutex<OwnedWriteHalf>, message: &Message) -> bool {
    match line(message) {
        Ok(line) => writer.lock().await.write_all(&line).await.is_ok(),
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{state::Exit, timeline::Timeline};

    /// Reads all messages of a connection, to its end.
    async fn read_all(stream: &mut UnixStream) -> Vec<Message> {
        let mut all = String::new();
        stream.read_to_string(&mut all).await.unwrap();
        all.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn those_who_wait_hear_of_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = UnixListener::bind(&path).unwrap();
            let (launcher, theirs) = StdUnixStream::pair().unwrap();
            theirs.set_nonblocking(true).unwrap();
            let mut command = UnixStream::from_std(theirs).unwrap();
            let mut server = Server::start(listener, Launcher::new(launcher).unwrap());

            let mut waiting = UnixStream::connect(&path).await.unwrap();
            waiting.write_all(&line(&Request::Wait).unwrap()).await.unwrap();
            let mut asking = UnixStream::connect(&path).await.unwrap();
            asking.write_all(&line(&Request::Start).unwrap()).await.unwrap();
            // Connections are accepted in their order, so the other one is served by now.
            let asked = server.next().await;
            assert_eq!(asked.request, Request::Start);
            drop(asked);

            let exit = Some(Exit { status: 7, oom_killed: false });
            let ended = Ended { exit, error: None, timeline: Timeline::default() };
            assert!(server.close(ended).await);
            for stream in [&mut waiting, &mut command] {
                let heard = read_all(stream).await;
                assert!(
                    matches!(&heard[..], [Message::Ended(ended)] if ended.exit == exit),
                    "{heard:?}"
                );
            }
            assert!(read_all(&mut asking).await.is_empty(), "closed without an answer");
        });
    }
}

//! Standard streams: relayed between this process's descriptors and streams to the guest.
//!
//! Each stream is a connection of its own with its own flow control, and a thread with blocking
//! reads and writes: the descriptors are inherited and may be anything, files and terminals
//! included, and their file status flags are shared with other processes, so they cannot be made
//! non-blocking.

mod apart;
mod last_words;

use std::{
    fs::File,
    io::{self, ErrorKind, Read, Write},
    net::Shutdown,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};
use tokio::{
    io::AsyncWriteExt,
    sync::{oneshot, watch},
    time::{Instant, timeout_at},
};

use isopod_protocol::{
    STREAM_PORT,
    agent::{FurtherStream, StreamTokens},
};

pub use self::apart::Apart;
use self::last_words::{LastWords, Listener};
use super::{preserved::Preserved, random_u64, vsock};
use crate::{
    error::{Explain, Result},
    state::StateDir,
};

/// How much is read at a time: what a socket's buffer holds by default is a little more.
const BUFFER_LEN: usize = 128 * 1024;

/// How much longer a guest may take for what a process wrote before it ended. The agent has all of
/// it, and ends the stream behind it.
const PATIENCE: Patience = Patience { interval: Duration::from_secs(1), intervals: 30 };

/// How long somebody is waited for, as far as it is noticed: by a look each interval.
#[derive(Debug, Clone, Copy)]
struct Patience {
    interval: Duration,
    intervals: u32,
}

/// The local ends of a process's standard streams. A missing one is `/dev/null` in the guest.
#[derive(Debug, Default)]
pub struct Local {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    /// Standard input and output are a terminal, and standard error is the same.
    terminal: bool,
    /// The descriptors from 3 on.
    further: Vec<Further>,
}

/// A descriptor beyond the standard streams, for each direction that it has.
#[derive(Debug)]
struct Further {
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
    /// The end of the output is said to a socket's other end; the input may still go on.
    socket: bool,
}

impl Local {
    /// This process's own standard streams. Those that are `/dev/null` are left out.
    ///
    /// # Errors
    ///
    /// If descriptors have run out.
    pub fn inherited() -> Result<Self> {
        Ok(Self {
            stdin: duplicate(rustix::stdio::stdin())?,
            stdout: duplicate(rustix::stdio::stdout())?,
            stderr: duplicate(rustix::stdio::stderr())?,
            ..Self::default()
        })
    }

    /// This process's standard input and output, as the terminal of a process in the guest.
    ///
    /// # Errors
    ///
    /// If descriptors have run out.
    pub fn inherited_terminal() -> Result<Self> {
        Ok(Self { stderr: None, terminal: true, ..Self::inherited()? })
    }

    /// A terminal for input and output.
    ///
    /// # Errors
    ///
    /// If descriptors have run out.
    pub fn terminal(terminal: BorrowedFd<'_>) -> Result<Self> {
        let (stdin, stdout) = (duplicate(terminal)?, duplicate(terminal)?);
        Ok(Self { stdin, stdout, terminal: true, ..Self::default() })
    }

    /// Takes over descriptors beyond the standard streams.
    ///
    /// # Errors
    ///
    /// If one is not open, or descriptors have run out.
    pub fn with(mut self, preserved: &[Preserved]) -> Result<Self> {
        for one in preserved {
            let fd = one.take()?;
            let (input, output) = match (one.input, one.output) {
                (true, true) => (duplicate(fd.as_fd())?, Some(fd)),
                (true, false) => (Some(fd), None),
                (false, true) => (None, Some(fd)),
                (false, false) => (None, None),
            };
            self.further.push(Further { input, output, socket: one.socket });
        }
        Ok(self)
    }

    /// Opens the streams to the guest. The tokens are to be sent to the agent.
    ///
    /// # Errors
    ///
    /// If a connection cannot be made.
    pub async fn connect(self, dir: &StateDir) -> Result<(StreamTokens, Streams)> {
        let mut stdin = connect(dir, self.stdin).await?;
        if let Some(stdin) = &mut stdin {
            stdin.on_demand = !self.terminal;
        }
        let stdout = connect(dir, self.stdout).await?;
        let stderr = connect(dir, self.stderr).await?;
        let token = |stream: &Option<Stream>| stream.as_ref().map_or(0, |stream| stream.token);
        let (mut inputs, mut outputs, mut further) = (Vec::new(), Vec::new(), Vec::new());
        for Further { input, output, socket } in self.further {
            let input = connect(dir, input).await?;
            let mut output = connect(dir, output).await?;
            if let Some(output) = &mut output {
                output.socket = socket;
            }
            further.push(FurtherStream {
                input: token(&input),
                output: token(&output),
                ..Default::default()
            });
            inputs.extend(input);
            outputs.extend(output);
        }
        let tokens = StreamTokens {
            stdin: token(&stdin),
            stdout: token(&stdout),
            stderr: token(&stderr),
            further,
            ..Default::default()
        };
        let (terminal, last_is_for_messages) = (self.terminal, self.terminal || stderr.is_some());
        inputs.extend(stdin);
        outputs.extend(stdout);
        outputs.extend(stderr);
        let last_words = None;
        Ok((tokens, Streams { inputs, outputs, terminal, last_is_for_messages, last_words }))
    }
}

/// Which of its standard streams this process gives up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// Not standard error, which is for messages to a person.
    InputAndOutput,
    /// All three: for a process whose caller does not stay, and waits for the end of its standard error
    /// as that of a command that has returned.
    All,
}

impl Release {
    /// What a process gives up whose caller stays. Its messages go to the log file, or, if it has none,
    /// to that caller: containerd waits for the end of a standard error that it does not pass on.
    pub fn but_for_messages() -> Self {
        match crate::logger::file() {
            Some(_) => Self::All,
            None => Self::InputAndOutput,
        }
    }
}

/// Points this process's standard streams at `/dev/null`. Copies of them stay as they are: when the
/// relays close theirs, whoever is at the other end hears of it, and not only when this process ends.
///
/// # Errors
///
/// If there is no `/dev/null`, or descriptors have run out.
pub fn release(streams: Release) -> Result<()> {
    let what = || "cannot use /dev/null".to_owned();
    let null = File::options().read(true).write(true).open("/dev/null").explain(what)?;
    rustix::stdio::dup2_stdin(&null).explain(what)?;
    rustix::stdio::dup2_stdout(&null).explain(what)?;
    if streams == Release::All {
        rustix::stdio::dup2_stderr(&null).explain(what)?;
    }
    Ok(())
}

/// A local descriptor and the connection to the guest that it belongs to.
#[derive(Debug)]
struct Stream {
    local: OwnedFd,
    remote: UnixStream,
    token: u64,
    /// `local` is a socket, whose other end is to hear of the end of the output.
    socket: bool,
    /// Nothing is read from `local` before the guest says that its process waits for it.
    on_demand: bool,
    /// Waits at the end of the output for something to say.
    listener: Option<Listener>,
}

/// Connected streams that are not relayed yet.
#[derive(Debug)]
pub struct Streams {
    inputs: Vec<Stream>,
    /// Those from descriptor 3 on, then standard output and error.
    outputs: Vec<Stream>,
    /// The last input and the last output are a terminal's, as far as they are connected.
    terminal: bool,
    /// The last output is standard error, or the terminal.
    last_is_for_messages: bool,
    last_words: Option<LastWords>,
}

impl Streams {
    /// Has [`Relay::say`] say something at the end of standard error, or of the terminal.
    pub fn with_last_words(mut self) -> Self {
        if let Some(stream) = self.outputs.last_mut().filter(|_| self.last_is_for_messages) {
            let (words, listener) = LastWords::new();
            (self.last_words, stream.listener) = (Some(words), Some(listener));
        }
        self
    }

    /// There is something to pass on that may outlive the process.
    pub fn have_output(&self) -> bool {
        !self.outputs.is_empty()
    }

    /// All descriptors of the streams.
    fn descriptors(&self) -> Vec<RawFd> {
        let streams = self.inputs.iter().chain(&self.outputs);
        streams.flat_map(|stream| [stream.local.as_raw_fd(), stream.remote.as_raw_fd()]).collect()
    }

    /// Starts to relay.
    ///
    /// # Errors
    ///
    /// If a thread cannot be started.
    pub fn relay(self) -> Result<Relay> {
        let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
        for stream in self.outputs {
            let (done, finished) = oneshot::channel();
            let Stream { local, remote, socket, listener, .. } = stream;
            let (flow, written) = Flow::new(remote);
            let flow = Arc::new(flow);
            let looked_at = Arc::downgrade(&flow);
            start("output", move || {
                relay_output(&flow, &local);
                if let Some(listener) = listener {
                    listener.write(&local);
                }
                if socket {
                    let _ = rustix::net::shutdown(&local, rustix::net::Shutdown::Write);
                }
                // Closed before anybody hears of the end.
                drop((flow, local));
                // Nobody waits any more, if this fails.
                let _ = done.send(());
            })?;
            outputs.push(Output { flow: looked_at, finished, written, ended_at: None, waited: 0 });
        }
        let mut terminal =
            self.terminal.then(|| outputs.last().map(|last| last.flow.clone())).flatten();
        for Stream { local, remote, on_demand, .. } in self.inputs.into_iter().rev() {
            let (done, finished) = oneshot::channel();
            let shown = terminal.take().filter(|_| rustix::termios::isatty(&local));
            // Not waited for as a rule: it may be blocked in a read that nobody will ever satisfy, and
            // ends with the process.
            start("input", move || {
                let wanted = !on_demand || is_wanted(&remote);
                if wanted
                    && relay_input(&local, &remote) == InputEnd::HungUp
                    && let Some(flow) = shown.and_then(|shown| shown.upgrade())
                {
                    // The guest hangs its terminal up in turn.
                    let _ = flow.remote.shutdown(Shutdown::Both);
                }
                drop((local, remote));
                let _ = done.send(());
            })?;
            inputs.push(finished);
        }
        Ok(Relay { inputs, outputs, last_words: self.last_words, next_look: None })
    }
}

/// Output on its way from the guest: what the thread that relays it shares with who waits for it.
#[derive(Debug)]
struct Flow {
    remote: UnixStream,
    /// Bytes that the guest has sent so far.
    received: AtomicU64,
    /// Bytes that have been written here so far. Dropped at the end.
    written: watch::Sender<u64>,
    /// The thread waits for the guest, and not for whoever reads here.
    waiting: AtomicBool,
}

impl Flow {
    /// A flow, and how much of it has been written.
    fn new(remote: UnixStream) -> (Self, watch::Receiver<u64>) {
        let (written, progress) = watch::channel(0);
        let (received, waiting) = (AtomicU64::new(0), AtomicBool::new(false));
        (Self { remote, received, written, waiting }, progress)
    }

    /// What the guest sends next.
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.waiting.store(true, Ordering::Relaxed);
        let received = (&self.remote).read(buffer);
        self.waiting.store(false, Ordering::Relaxed);
        if let Ok(length) = received {
            self.received.fetch_add(length as u64, Ordering::Relaxed);
        }
        received
    }
}

/// An output that is relayed.
#[derive(Debug)]
struct Output {
    /// The thread has it, and closes it at its end.
    flow: Weak<Flow>,
    finished: oneshot::Receiver<()>,
    /// Bytes that have been written here.
    written: watch::Receiver<u64>,
    /// How much had been sent when its process was known to have ended.
    ended_at: Option<u64>,
    /// In how many looks since then the guest was waited for.
    waited: u32,
}

impl Output {
    /// Ends the stream if the guest takes too long, or sends more than it can have had. Time in which
    /// nobody reads here is not the guest's.
    fn look(&mut self, most: u64, patience: Patience) {
        let Some(flow) = self.flow.upgrade() else { return };
        let received = flow.received.load(Ordering::Relaxed);
        let ended_at = *self.ended_at.get_or_insert(received);
        self.waited += u32::from(flow.waiting.load(Ordering::Relaxed));
        if self.waited > patience.intervals || received - ended_at > most {
            log::warn!("the guest does not end the output of a process that has ended: cut off");
            // What has been received is still there to be read.
            let _ = flow.remote.shutdown(Shutdown::Both);
        }
    }
}

/// Running relays.
#[derive(Debug, Default)]
pub struct Relay {
    inputs: Vec<oneshot::Receiver<()>>,
    outputs: Vec<Output>,
    last_words: Option<LastWords>,
    next_look: Option<Instant>,
}

impl Relay {
    /// The process has ended: nothing is to be said of that.
    pub fn process_ended(&mut self) {
        self.last_words = None;
    }

    /// Says why there is no more output, if nobody else does, once all that has come is written.
    pub fn say(&mut self, text: String) {
        if let Some(words) = self.last_words.take() {
            words.say(text);
        }
    }

    /// Waits until all output of a process that has ended has been written, for as long as it takes
    /// whoever reads it, and at most half a minute for the guest. That cannot have kept more than
    /// `most` bytes, the size of its memory. Can be waited for again if cancelled.
    pub async fn finished(&mut self, most: u64) {
        self.finished_within(most, PATIENCE).await;
    }

    /// Waits until all output has ended, however long that takes. Can be waited for again if cancelled.
    pub async fn outputs_ended(&mut self) {
        while let Some(output) = self.outputs.last_mut() {
            let _ = (&mut output.finished).await;
            self.outputs.pop();
        }
    }

    /// As [`Self::outputs_ended`], for all input as well.
    async fn all_ended(&mut self) {
        self.outputs_ended().await;
        while let Some(input) = self.inputs.last_mut() {
            let _ = input.await;
            self.inputs.pop();
        }
    }

    /// Waits until as much of each output has been written as `marks` say, or has ended. The guest and
    /// readers have as long as in [`Self::finished`]. An output without a mark has to end.
    async fn written(&mut self, marks: &[u64], most: u64) {
        self.written_within(marks, most, PATIENCE).await;
    }

    async fn written_within(&mut self, marks: &[u64], most: u64, patience: Patience) {
        let mut marks = marks.iter().copied();
        for output in &mut self.outputs {
            let mark = marks.next().unwrap_or(u64::MAX);
            loop {
                let limit = Instant::now() + patience.interval;
                // An error means that the output has ended.
                if timeout_at(limit, output.written.wait_for(|written| *written >= mark))
                    .await
                    .is_ok()
                {
                    break;
                }
                output.look(most, patience);
            }
        }
    }

    async fn finished_within(&mut self, most: u64, patience: Patience) {
        while let Some(output) = self.outputs.last_mut() {
            let look = *self.next_look.get_or_insert_with(|| Instant::now() + patience.interval);
            // An error means that the thread is gone, which is as finished as can be.
            if timeout_at(look, &mut output.finished).await.is_ok() {
                self.outputs.pop();
                continue;
            }
            self.next_look = None;
            for output in &mut self.outputs {
                output.look(most, patience);
            }
        }
    }
}

fn start(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    thread::Builder::new()
        .name(name.to_owned())
        .stack_size(64 * 1024)
        .spawn(body)
        .map(drop)
        .explain(|| format!("cannot start the thread for {name}"))
}

async fn connect(dir: &StateDir, local: Option<OwnedFd>) -> Result<Option<Stream>> {
    let Some(local) = local else { return Ok(None) };
    // 0 means "not connected".
    let token = random_u64()?.max(1);
    let mut stream = vsock::connect(dir, STREAM_PORT).await?;
    let what = || "cannot open a stream to the microVM".to_owned();
    stream.write_all(&token.to_le_bytes()).await.explain(what)?;
    let remote = stream.into_std().explain(what)?;
    remote.set_nonblocking(false).explain(what)?;
    Ok(Some(Stream { local, remote, token, socket: false, on_demand: false, listener: None }))
}

fn duplicate(fd: BorrowedFd<'_>) -> Result<Option<OwnedFd>> {
    if is_null(fd) {
        return Ok(None);
    }
    fd.try_clone_to_owned().map(Some).explain(|| "cannot duplicate a descriptor".into())
}

/// It is `/dev/null`, or not open at all.
fn is_null(fd: BorrowedFd<'_>) -> bool {
    match rustix::fs::fstat(fd) {
        Ok(stat) => {
            rustix::fs::FileType::from_raw_mode(stat.st_mode)
                == rustix::fs::FileType::CharacterDevice
                && stat.st_rdev == rustix::fs::makedev(1, 3)
        }
        Err(_) => true,
    }
}

/// Waits until the guest's process waits for its input. False if it never will.
fn is_wanted(mut remote: &UnixStream) -> bool {
    remote.read_exact(&mut [0]).is_ok()
}

/// How an input ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum InputEnd {
    /// There is no more of it, or nobody to read it.
    Plain,
    /// Its other end has been closed: that of a terminal has been hung up.
    HungUp,
}

/// Copies from `local` to `remote` until either ends, and passes the end of input on.
fn relay_input(local: &OwnedFd, remote: &UnixStream) -> InputEnd {
    let mut buffer = vec![0; BUFFER_LEN];
    let mut remote_out = remote;
    let mut end = InputEnd::Plain;
    loop {
        match wait_for_input(local, remote) {
            Ok(Some(found)) => end = found,
            // Nobody reads there any more: leave the rest of the input to whoever else may.
            Ok(None) => return InputEnd::Plain,
            Err(_) => break,
        }
        let length = match rustix::io::read(local, &mut buffer) {
            Ok(0) => break,
            Ok(length) => length,
            Err(Errno::INTR | Errno::AGAIN) => continue,
            // A terminal that has hung up, for one. There will be no more input.
            Err(_) => break,
        };
        if remote_out.write_all(&buffer[..length]).is_err() {
            return InputEnd::Plain;
        }
    }
    // The other side may be gone already.
    let _ = remote.shutdown(Shutdown::Write);
    end
}

/// Waits for something to read from `local`, the end included, and tells whether its other end has been
/// closed. None if `remote` was closed instead.
fn wait_for_input(local: &OwnedFd, remote: &UnixStream) -> io::Result<Option<InputEnd>> {
    loop {
        let mut fds = [PollFd::new(local, PollFlags::IN), PollFd::new(remote, PollFlags::RDHUP)];
        match poll(&mut fds, None) {
            Err(Errno::INTR) => continue,
            result => result.map(drop)?,
        }
        let closed = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL;
        if fds[1].revents().intersects(closed) {
            return Ok(None);
        }
        let found = fds[0].revents();
        if !found.is_empty() {
            let hung_up = found.contains(PollFlags::HUP);
            return Ok(Some(if hung_up { InputEnd::HungUp } else { InputEnd::Plain }));
        }
    }
}

/// Copies from the guest to `local` until either ends.
fn relay_output(flow: &Flow, local: &OwnedFd) {
    let mut buffer = vec![0; BUFFER_LEN];
    loop {
        let length = match flow.receive(&mut buffer) {
            Ok(0) => return,
            Ok(length) => length,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        if let Err(e) = write_all(local, &buffer[..length]) {
            // Nobody reads any more, or the disk is full. The process gets the same from its next
            // write when its agent sees the connection closed.
            if e != Errno::PIPE {
                log::debug!("output is lost: {e}");
            }
            let _ = flow.remote.shutdown(Shutdown::Both);
            return;
        }
        flow.written.send_modify(|written| *written += length as u64);
    }
}

/// Writes all of `bytes`, also to a descriptor that somebody else has made non-blocking.
fn write_all(local: &OwnedFd, mut bytes: &[u8]) -> std::result::Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(local, bytes) {
            Ok(0) => return Err(Errno::IO),
            Ok(length) => bytes = &bytes[length..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                match poll(&mut [PollFd::new(&local.as_fd(), PollFlags::OUT)], None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(e) => return Err(e),
                }
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;

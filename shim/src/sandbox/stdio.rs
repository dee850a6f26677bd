//! Standard streams: relayed between this process's descriptors and streams to the guest.
//!
//! Each stream is a connection of its own with its own flow control, and a thread with blocking
//! reads and writes: the descriptors are inherited and may be anything, files and terminals
//! included, and their file status flags are shared with other processes, so they cannot be made
//! non-blocking.

mod apart;
mod copy;
mod last_words;
mod relay;

use std::{
    fs::File,
    net::Shutdown,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    sync::Arc,
};

use tokio::{io::AsyncWriteExt, sync::oneshot};

use isopod_protocol::{
    STREAM_PORT,
    agent::{FurtherStream, StreamTokens},
};

pub use self::{apart::Apart, relay::Relay};
use self::{
    copy::{Flow, InputEnd, is_wanted, relay_input, relay_output},
    last_words::{LastWords, Listener},
    relay::{Output, start},
};
use super::{preserved::Preserved, random_u64, vsock};
use crate::{
    error::{Explain, Result},
    state::StateDir,
};

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

#[cfg(test)]
mod tests;

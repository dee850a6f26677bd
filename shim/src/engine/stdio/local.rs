//! Local ends of a process's streams, and their connections to the guest.

use std::os::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    unix::net::UnixStream,
};

use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;

use isopod_protocol::{
    STREAM_PORT,
    agent::{FurtherStream, StreamTokens},
};

use crate::{
    console_socket,
    descriptor::is_null,
    engine::stdio::{
        completion::start,
        copy,
        streams::{Stream, Streams},
    },
    error::{Error, Explain, Result},
    microvm::{agent::Screen, vsock},
    preserved::Preserved,
    random::random_u64,
    state::StateDir,
    terminal::{Size, Terminal},
};

/// Local ends of a process's standard streams. A missing stream is `/dev/null` in the guest.
#[derive(Debug, Default)]
struct Local {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    /// True if a client passes standard input on, and waits until it is wanted.
    client: bool,
    /// True if standard input and output are a terminal. Standard error is then the same terminal.
    terminal: bool,
    /// Descriptors from 3 on.
    further: Vec<Further>,
}

/// A descriptor beyond the standard streams, once for each of its directions.
#[derive(Debug)]
struct Further {
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
    /// True for a socket: its other end is told of the end of the output, while input may go on.
    socket: bool,
}

/// The local ends of a process that is about to be made, and the terminal at its begin.
#[derive(Debug)]
pub(crate) struct Io {
    local: Local,
    screen: Screen,
}

/// An [`Io`] without its descriptors, for another process that gets these beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IoPlan {
    stdin: bool,
    stdout: bool,
    stderr: bool,
    client: bool,
    terminal: bool,
    further: Vec<FurtherPlan>,
    screen: Screen,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct FurtherPlan {
    input: bool,
    output: bool,
    socket: bool,
}

impl IoPlan {
    /// The local ends of this plan, from descriptors in the order of [`Io::into_parts`].
    ///
    /// # Errors
    ///
    /// If a descriptor is missing.
    pub(crate) fn with(self, descriptors: &mut impl Iterator<Item = OwnedFd>) -> Result<Io> {
        let mut next = |wanted: bool| match wanted {
            false => Ok(None),
            true => descriptors
                .next()
                .map(Some)
                .ok_or_else(|| Error::new("a descriptor of the process's streams was not passed")),
        };
        let (stdin, stdout, stderr) = (next(self.stdin)?, next(self.stdout)?, next(self.stderr)?);
        let further = self.further.iter().map(|one| {
            Ok(Further { input: next(one.input)?, output: next(one.output)?, socket: one.socket })
        });
        let further = further.collect::<Result<_>>()?;
        let (client, terminal) = (self.client, self.terminal);
        let local = Local { stdin, stdout, stderr, client, terminal, further };
        Ok(Io { local, screen: self.screen })
    }
}

/// The standard streams of a process, as a front end has opened them. A missing stream is
/// `/dev/null` in the guest.
#[derive(Debug, Default)]
pub(crate) struct StandardStreams {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
    /// True if the process has a terminal in the guest, whose bytes go through standard input and
    /// output.
    pub(crate) terminal: bool,
    /// The size with which the terminal begins.
    pub(crate) size: Option<Size>,
}

impl From<StandardStreams> for Io {
    fn from(streams: StandardStreams) -> Self {
        let StandardStreams { stdin, stdout, stderr, terminal, size } = streams;
        let local = Local { stdin, stdout, stderr, terminal, ..Local::default() };
        Self { local, screen: Screen::of(None, size) }
    }
}

impl Io {
    /// Opens the ends where the caller of this process wants them. `size` is for a new terminal.
    /// Returns the host's end of a new terminal too.
    ///
    /// # Errors
    ///
    /// If a stream or a preserved descriptor cannot be duplicated, or the terminal cannot be made.
    pub(crate) fn open(
        terminal: Option<&Terminal>,
        size: Option<Size>,
        preserved: &[Preserved],
    ) -> Result<(Self, Option<OwnedFd>)> {
        let (local, size, console) = match terminal {
            None => (Local::inherited()?, None, None),
            Some(Terminal::Inherited { size }) => (Local::inherited_terminal()?, *size, None),
            Some(Terminal::Socket { path }) => {
                let console = console_socket::make(path, size)?;
                (Local::terminal(console.as_fd())?, size, Some(console))
            }
        };
        let screen = Screen::of(terminal, size);
        Ok((Self { local: local.with(preserved)?, screen }, console))
    }

    /// Passes standard input on by a thread of this process, if it is a terminal. So the terminal's
    /// job control holds, although another process relays the streams: whoever is in the background
    /// reads nothing.
    pub(crate) fn keep_terminal(&mut self) -> Result<()> {
        let terminal = self.local.stdin.take_if(|stdin| rustix::termios::isatty(stdin));
        let Some(terminal) = terminal else { return Ok(()) };
        let (ours, theirs) = UnixStream::pair().explain(|| "cannot make a socket pair".into())?;
        start("input", move || copy::pass_on(&terminal, &ours))?;
        self.local.stdin = Some(theirs.into());
        self.local.client = true;
        Ok(())
    }

    /// Takes the ends apart, to be passed to another process.
    pub(crate) fn into_parts(self) -> (IoPlan, Vec<OwnedFd>) {
        let Local { stdin, stdout, stderr, client, terminal, further } = self.local;
        let plan = IoPlan {
            stdin: stdin.is_some(),
            stdout: stdout.is_some(),
            stderr: stderr.is_some(),
            client,
            terminal,
            further: further
                .iter()
                .map(|one| FurtherPlan {
                    input: one.input.is_some(),
                    output: one.output.is_some(),
                    socket: one.socket,
                })
                .collect(),
            screen: self.screen,
        };
        let further = further.into_iter().flat_map(|one| [one.input, one.output]);
        let all = [stdin, stdout, stderr].into_iter().chain(further).flatten().collect();
        (plan, all)
    }

    /// Opens the streams to the guest of the sandbox whose state directory is `dir`. The caller has
    /// to send the tokens to the agent.
    pub(crate) async fn connect(self, dir: &StateDir) -> Result<(StreamTokens, Screen, Streams)> {
        let (tokens, streams) = self.local.connect(dir).await?;
        Ok((tokens, self.screen, streams))
    }
}

impl Local {
    /// Duplicates this process's standard streams. A stream that is `/dev/null` is left out.
    fn inherited() -> Result<Self> {
        Ok(Self {
            stdin: duplicate(rustix::stdio::stdin())?,
            stdout: duplicate(rustix::stdio::stdout())?,
            stderr: duplicate(rustix::stdio::stderr())?,
            ..Self::default()
        })
    }

    /// Duplicates this process's standard input and output, as the terminal of a process in the
    /// guest.
    fn inherited_terminal() -> Result<Self> {
        Ok(Self { stderr: None, terminal: true, ..Self::inherited()? })
    }

    /// Duplicates a terminal for input and output.
    fn terminal(terminal: BorrowedFd<'_>) -> Result<Self> {
        let (stdin, stdout) = (duplicate(terminal)?, duplicate(terminal)?);
        Ok(Self { stdin, stdout, terminal: true, ..Self::default() })
    }

    /// Takes over descriptors beyond the standard streams.
    fn with(mut self, preserved: &[Preserved]) -> Result<Self> {
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

    async fn connect(self, dir: &StateDir) -> Result<(StreamTokens, Streams)> {
        let mut stdin = connect(dir, self.stdin).await?;
        if let Some(stdin) = &mut stdin {
            stdin.on_demand = !self.terminal;
            stdin.client = self.client;
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
        let loss_notice = None;
        Ok((tokens, Streams { inputs, outputs, terminal, last_is_for_messages, loss_notice }))
    }
}

async fn connect(dir: &StateDir, local: Option<OwnedFd>) -> Result<Option<Stream>> {
    let Some(local) = local else { return Ok(None) };
    // Token 0 means "not connected".
    let token = random_u64()?.max(1);
    let mut stream = vsock::connect(dir, STREAM_PORT).await?;
    let what = || "cannot open a stream to the microVM".to_owned();
    stream.write_all(&token.to_le_bytes()).await.explain(what)?;
    let remote = stream.into_std().explain(what)?;
    remote.set_nonblocking(false).explain(what)?;
    Ok(Some(Stream {
        local,
        remote,
        token,
        socket: false,
        on_demand: false,
        client: false,
        listener: None,
    }))
}

fn duplicate(fd: BorrowedFd<'_>) -> Result<Option<OwnedFd>> {
    if is_null(fd) {
        return Ok(None);
    }
    fd.try_clone_to_owned().map(Some).explain(|| "cannot duplicate a descriptor".into())
}

//! Local ends of a process's streams, and their connections to the guest.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use tokio::io::AsyncWriteExt;

use isopod_protocol::{
    STREAM_PORT,
    agent::{FurtherStream, StreamTokens},
};

use crate::{
    console_socket,
    descriptor::is_null,
    engine::stdio::streams::{Stream, Streams},
    error::{Explain, Result},
    microvm::{agent::Screen, vsock},
    preserved::Preserved,
    random::random_u64,
    state::StateDir,
    terminal::{Size, Terminal},
};

/// Local ends of a process's standard streams. A missing stream is `/dev/null` in the guest.
#[derive(Debug, Default)]
pub(crate) struct Local {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
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

/// The local ends of a process that is about to be made.
#[derive(Debug)]
pub(crate) struct Ends {
    /// The ends.
    pub(crate) local: Local,
    /// The terminal at its begin.
    pub(crate) screen: Screen,
    /// The host's end of a new terminal.
    pub(crate) console: Option<OwnedFd>,
}

impl Ends {
    /// Opens the ends where the caller wants them. `size` is for a new terminal.
    pub(crate) fn open(
        terminal: Option<&Terminal>,
        size: Option<Size>,
        preserved: &[Preserved],
    ) -> Result<Self> {
        let (local, size, console) = match terminal {
            None => (Local::inherited()?, None, None),
            Some(Terminal::Inherited { size }) => (Local::inherited_terminal()?, *size, None),
            Some(Terminal::Socket { path }) => {
                let console = console_socket::make(path, size)?;
                (Local::terminal(console.as_fd())?, size, Some(console))
            }
        };
        let screen = Screen::of(terminal, size);
        Ok(Self { local: local.with(preserved)?, screen, console })
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

    /// Opens the streams to the guest. The caller has to send the tokens to the agent.
    pub(crate) async fn connect(self, dir: &StateDir) -> Result<(StreamTokens, Streams)> {
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
    Ok(Some(Stream { local, remote, token, socket: false, on_demand: false, listener: None }))
}

fn duplicate(fd: BorrowedFd<'_>) -> Result<Option<OwnedFd>> {
    if is_null(fd) {
        return Ok(None);
    }
    fd.try_clone_to_owned().map(Some).explain(|| "cannot duplicate a descriptor".into())
}

//! Moves bytes between a process's stdio and the host's connections.
//!
//! Nothing is buffered beyond one read. While one side accepts nothing, the other side is not read,
//! and the pipe or the connection's own window stops the writer.
//!
//! The runtime has a single thread, so all streams share one buffer and an idle stream owns none.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use rustix::io::Errno;
use rustix::net::Shutdown;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::demand;
use crate::reaper::{ExitReceiver, exited};
use crate::stream::Connection;
use crate::syscall;

/// Byte that tells the host that a process waits for its standard input.
const DEMAND: u8 = b'+';

/// Bytes moved at a time: the default capacity of a pipe.
const CHUNK: usize = 64 * 1024;

/// Most bytes read from a terminal after its process has ended, if other processes still have it
/// open. The kernel's terminal buffers hold less.
const TERMINAL_TAIL: usize = 1024 * 1024;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; CHUNK].into_boxed_slice());
}

/// The agent's end of a pipe or of a terminal.
pub(crate) type Endpoint = Arc<AsyncFd<OwnedFd>>;

/// Makes a descriptor non-blocking and registers it with the runtime.
pub(crate) fn endpoint(fd: OwnedFd, interest: Interest) -> io::Result<Endpoint> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok(Arc::new(syscall::watch(fd, interest)?))
}

/// Treatment of output that is written after the process has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Late {
    /// Late output is discarded, and the output ends. Nothing else of the container is left.
    Dropped,
    /// Late output is passed on until the last process that can write it has closed the output.
    PassedOn,
}

/// Counter of the bytes that processes have written to an output.
#[derive(Debug, Clone)]
pub(crate) struct Written {
    /// The agent's end of the output, as long as it is open.
    source: Weak<AsyncFd<OwnedFd>>,
    /// Bytes that were read from the output.
    read: Arc<AtomicU64>,
}

impl Written {
    /// Bytes written up to now.
    ///
    /// The buffers of a terminal cannot be counted, so its count is `u64::MAX`, more than any
    /// output. A terminal's output ends with its process, which hangs it up.
    pub(crate) fn bytes(&self) -> u64 {
        let read = self.read.load(Ordering::Relaxed);
        let Some(source) = self.source.upgrade() else { return read };
        if rustix::termios::isatty(source.get_ref()) {
            return u64::MAX;
        }
        // No read comes between the two counts: the runtime has a single thread.
        read.saturating_add(rustix::io::ioctl_fionread(source.get_ref()).unwrap_or(0))
    }
}

/// An output with its counter.
pub(crate) struct Output {
    source: Endpoint,
    late: Late,
    read: Arc<AtomicU64>,
}

impl Output {
    pub(crate) fn new(source: Endpoint, late: Late) -> Self {
        Self { source, late, read: Arc::default() }
    }

    pub(crate) fn written(&self) -> Written {
        Written { source: Arc::downgrade(&self.source), read: Arc::clone(&self.read) }
    }

    /// Sends the output to the host, until its end.
    pub(crate) async fn send(self, stream: Connection, mut exit: ExitReceiver) {
        let Self { source, late, read } = self;
        let exit = match late {
            Late::Dropped => Some(&mut exit),
            Late::PassedOn => None,
        };
        let end = tokio::select! {
            biased;
            end = copy(&source, &stream, exit, &read) => end.unwrap_or(End::Source),
            // The host sends nothing, so the only event here is the end of its connection.
            () = discard(&stream) => End::Sink,
        };
        match end {
            // Dropping the pipe gives the process SIGPIPE, as from a reader on this machine.
            End::Sink => return,
            End::Source => {}
            End::ProcessEnded => {
                let _ = drain(&source, &stream).await;
            }
        }
        let _ = rustix::net::shutdown(stream.get_ref(), Shutdown::Write);
        // Closing now could reset the connection before the host has read all bytes. And
        // descendants of the process may still write, and must not get SIGPIPE for it.
        let linger = discard(&stream);
        if end == End::ProcessEnded {
            tokio::join!(linger, discard(&source));
        } else {
            drop(source);
            linger.await;
        }
    }
}

/// Serves input and output of a terminal, until the host has closed the connection for its output.
/// Then the terminal is closed too, which hangs it up.
pub(crate) async fn terminal(
    terminal: Endpoint,
    input: Option<Connection>,
    output: Option<Connection>,
    exit: ExitReceiver,
) {
    let typed = {
        let (terminal, exit) = (terminal.clone(), exit.clone());
        async move {
            if let Some(input) = input {
                terminal_input(input, terminal, exit).await;
            }
            std::future::pending::<()>().await;
        }
    };
    let shown = async move {
        match output {
            Some(output) => Output::new(terminal, Late::Dropped).send(output, exit).await,
            // Output without a connection is discarded. Otherwise the terminal would fill up and
            // stop the process.
            None => discard(&terminal).await,
        }
    };
    tokio::select! {
        () = typed => {}
        () = shown => {}
    }
}

enum Step {
    Moved(usize),
    WouldBlock,
    /// The sink would block. Of the bytes read, `rest` still has to be written.
    Pending {
        read: usize,
        rest: Vec<u8>,
    },
    SourceEnded,
    SinkClosed,
}

/// Makes one read, and as many writes as are possible without waiting.
fn step(source: impl AsFd, sink: impl AsFd, limit: usize) -> Step {
    SCRATCH.with_borrow_mut(|buffer| {
        let limit = limit.min(buffer.len());
        let n = match rustix::io::read(&source, &mut buffer[..limit]) {
            Ok(0) => return Step::SourceEnded,
            Ok(n) => n,
            Err(Errno::AGAIN) => return Step::WouldBlock,
            Err(Errno::INTR) => return Step::Moved(0),
            // EIO: the last process with the terminal open is gone.
            Err(_) => return Step::SourceEnded,
        };
        let mut written = 0;
        while written < n {
            match rustix::io::write(&sink, &buffer[written..n]) {
                Ok(k) => written += k,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    return Step::Pending { read: n, rest: buffer[written..n].to_vec() };
                }
                Err(_) => return Step::SinkClosed,
            }
        }
        Step::Moved(n)
    })
}

async fn write_all(sink: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut guard = sink.writable().await?;
        match guard.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), bytes)?)) {
            Ok(Ok(n)) => bytes = &bytes[n..],
            Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(e)) => return Err(e),
            Err(_would_block) => {}
        }
    }
    Ok(())
}

#[derive(PartialEq, Eq)]
enum End {
    Source,
    Sink,
    ProcessEnded,
}

/// Copies until either side ends or, with `exit`, the process ends. Counts the bytes read.
async fn copy(
    source: &AsyncFd<OwnedFd>,
    sink: &AsyncFd<OwnedFd>,
    mut exit: Option<&mut ExitReceiver>,
    count: &AtomicU64,
) -> io::Result<End> {
    loop {
        let ended = async {
            match &mut exit {
                Some(exit) => drop(exited(exit).await),
                None => std::future::pending().await,
            }
        };
        let mut guard = tokio::select! {
            biased;
            () = ended => return Ok(End::ProcessEnded),
            guard = source.readable() => guard?,
        };
        match step(source.get_ref(), sink.get_ref(), CHUNK) {
            Step::Moved(read) => drop(count.fetch_add(read as u64, Ordering::Relaxed)),
            Step::WouldBlock => guard.clear_ready(),
            Step::Pending { read, rest } => {
                count.fetch_add(read as u64, Ordering::Relaxed);
                if write_all(sink, &rest).await.is_err() {
                    return Ok(End::Sink);
                }
            }
            Step::SourceEnded => return Ok(End::Source),
            Step::SinkClosed => return Ok(End::Sink),
        }
    }
}

/// Sends the bytes that were written before the call, and does not wait for later ones.
async fn drain(source: &AsyncFd<OwnedFd>, sink: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut left = if rustix::termios::isatty(source.get_ref()) {
        TERMINAL_TAIL
    } else {
        usize::try_from(rustix::io::ioctl_fionread(source.get_ref())?).unwrap_or(usize::MAX)
    };
    while left > 0 {
        match step(source.get_ref(), sink.get_ref(), left) {
            Step::Moved(n) => left = left.saturating_sub(n),
            Step::Pending { read, rest } => {
                write_all(sink, &rest).await?;
                left = left.saturating_sub(read);
            }
            Step::WouldBlock | Step::SourceEnded | Step::SinkClosed => break,
        }
        tokio::task::consume_budget().await;
    }
    Ok(())
}

/// Reads to the end and discards the bytes.
async fn discard(source: &AsyncFd<OwnedFd>) {
    loop {
        let Ok(mut guard) = source.readable().await else { return };
        let read =
            SCRATCH.with_borrow_mut(|buffer| rustix::io::read(source.get_ref(), &mut buffer[..]));
        match read {
            Ok(0) => return,
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => guard.clear_ready(),
            Err(_) => return,
        }
    }
}

/// Copies input from the host to a pipe, and closes the pipe at its end. When the process closes
/// its stdin, the connection is closed, so that the host stops reading its own input.
pub(crate) async fn input(stream: Connection, sink: Endpoint, mut exit: ExitReceiver) {
    // A pipe without a reader becomes ready for ERROR, even while no input flows.
    let closed = async {
        let _ = sink.ready(Interest::ERROR).await;
    };
    let copied = AtomicU64::new(0);
    tokio::select! {
        _ = closed => {}
        _ = copy(&stream, &sink, Some(&mut exit), &copied) => {}
    }
}

/// Copies standard input to a pipe. One byte tells the host when the process first waits for input;
/// the host reads nothing of its own before.
pub(crate) async fn standard_input(stream: Connection, sink: Endpoint, mut exit: ExitReceiver) {
    let Ok(pipe) = rustix::fs::fstat(sink.get_ref()) else { return };
    tokio::select! {
        biased;
        _ = exited(&mut exit) => return,
        // The pipe has no reader any more.
        _ = sink.ready(Interest::ERROR) => return,
        () = demand::comes(pipe.st_ino) => {}
    }
    if write_all(&stream, &[DEMAND]).await.is_ok() {
        input(stream, sink, exit).await;
    }
}

/// Copies input to a socket, which stays open for the process's output.
pub(crate) async fn socket_input(stream: Connection, sink: Endpoint, mut exit: ExitReceiver) {
    let copied = copy(&stream, &sink, Some(&mut exit), &AtomicU64::new(0)).await;
    if !matches!(copied, Ok(End::ProcessEnded)) {
        let _ = rustix::net::shutdown(sink.get_ref(), Shutdown::Write);
    }
}

/// Copies input to a terminal, which stays open when the host's input ends.
async fn terminal_input(stream: Connection, sink: Endpoint, mut exit: ExitReceiver) {
    let copied = copy(&stream, &sink, Some(&mut exit), &AtomicU64::new(0)).await;
    if matches!(copied, Ok(End::Source)) {
        exited(&mut exit).await;
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;

    use tokio::sync::watch;

    use super::*;
    use crate::reaper::Exit;

    fn pipe() -> (OwnedFd, OwnedFd) {
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
    }

    fn connection(stream: UnixStream) -> Connection {
        stream.set_nonblocking(true).unwrap();
        syscall::watch(stream.into(), Interest::READABLE | Interest::WRITABLE).unwrap()
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_was_written_before_the_exit_arrives_though_a_descendant_holds_the_pipe() {
        let (read, write) = pipe();
        let (mut host, guest) = UnixStream::pair().unwrap();
        let (exit, receiver) = watch::channel(None);
        let source = endpoint(read, Interest::READABLE).unwrap();
        let pump = Output::new(source, Late::Dropped).send(connection(guest), receiver);
        let pump = tokio::spawn(pump);
        tokio::task::yield_now().await;
        rustix::io::write(&write, b"last words").unwrap();
        exit.send_replace(Some(Exit { status: 0, signal: 0 }));
        let reader = std::thread::spawn(move || {
            let mut text = String::new();
            host.read_to_string(&mut text).unwrap();
            text
        });
        while !reader.is_finished() {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        assert_eq!(reader.join().unwrap(), "last words");
        // The descendant's writes are read and discarded.
        for _ in 0..64 {
            rustix::io::write(&write, &[0; 4096]).unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        drop(write);
        pump.await.unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_a_descendant_writes_later_is_passed_on_and_not_counted() {
        let (read, write) = pipe();
        let (mut host, guest) = UnixStream::pair().unwrap();
        let (exit, receiver) = watch::channel(None);
        let output = Output::new(endpoint(read, Interest::READABLE).unwrap(), Late::PassedOn);
        let written = output.written();
        rustix::io::write(&write, b"in time ").unwrap();
        assert_eq!(written.bytes(), 8, "not read yet");
        let pump = tokio::spawn(output.send(connection(guest), receiver));
        exit.send_replace(Some(Exit { status: 0, signal: 0 }));
        while written.read.load(Ordering::Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(written.bytes(), 8, "read");
        rustix::io::write(&write, b"late").unwrap();
        drop(write);
        let reader = std::thread::spawn(move || {
            let mut text = String::new();
            host.read_to_string(&mut text).unwrap();
            text
        });
        pump.await.unwrap();
        assert_eq!(reader.join().unwrap(), "in time late");
        assert_eq!(written.bytes(), 12, "the pipe is gone");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_reader_that_has_gone_closes_an_idle_output() {
        let (read, write) = pipe();
        let (host, guest) = UnixStream::pair().unwrap();
        let (_exit, receiver) = watch::channel(None);
        let output = Output::new(endpoint(read, Interest::READABLE).unwrap(), Late::PassedOn);
        let pump = tokio::spawn(output.send(connection(guest), receiver));
        tokio::task::yield_now().await;
        drop(host);
        pump.await.unwrap();
        assert_eq!(rustix::io::write(&write, b"x"), Err(Errno::PIPE));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn end_of_input_closes_the_pipe() {
        let (read, write) = pipe();
        let (mut host, guest) = UnixStream::pair().unwrap();
        let (_exit, receiver) = watch::channel(None);
        let sink = endpoint(write, Interest::WRITABLE | Interest::ERROR).unwrap();
        let pump = tokio::spawn(input(connection(guest), sink, receiver));
        host.write_all(b"abc").unwrap();
        drop(host);
        pump.await.unwrap();
        let mut text = String::new();
        std::fs::File::from(read).read_to_string(&mut text).unwrap();
        assert_eq!(text, "abc");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn closed_stdin_closes_the_connection() {
        let (read, write) = pipe();
        let (mut host, guest) = UnixStream::pair().unwrap();
        let (_exit, receiver) = watch::channel(None);
        let sink = endpoint(write, Interest::WRITABLE | Interest::ERROR).unwrap();
        let pump = tokio::spawn(input(connection(guest), sink, receiver));
        tokio::task::yield_now().await;
        drop(read);
        pump.await.unwrap();
        assert_eq!(host.read(&mut [0]).unwrap(), 0);
    }
}

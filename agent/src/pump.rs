//! Moves bytes between a process's stdio and the host's connections.
//!
//! Nothing is buffered beyond one read: when the other side does not take it, the source is not
//! read either, and the pipe or the connection's own window holds the writer back. Idle streams own
//! no buffer; all of them share one, which works because the runtime has a single thread.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::Shutdown;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::demand;
use crate::reaper::{ExitReceiver, exited};
use crate::stream::Connection;

/// What the host gets when a process first waits for its standard input.
const DEMAND: u8 = b'+';

/// Bytes moved at a time: what a pipe holds by default.
const CHUNK: usize = 64 * 1024;

/// Most bytes taken from a terminal after its process has ended, when other processes still have it
/// open. The kernel's terminal buffers hold less.
const TERMINAL_TAIL: usize = 1024 * 1024;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; CHUNK].into_boxed_slice());
}

/// The agent's end of a pipe or of a terminal.
pub(crate) type Endpoint = Arc<AsyncFd<OwnedFd>>;

/// Makes a descriptor ready for the pumps.
pub(crate) fn endpoint(fd: OwnedFd, interest: Interest) -> io::Result<Endpoint> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok(Arc::new(watch(fd, interest)?))
}

/// Registers a descriptor that does not block with the runtime.
pub(crate) fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` stays open, and the same, for as long as the registration holds it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

enum Step {
    Moved(usize),
    WouldBlock,
    /// Of the bytes that were read, the rest still has to be written.
    Pending {
        read: usize,
        rest: Vec<u8>,
    },
    SourceEnded,
    SinkClosed,
}

/// One read and as many writes as go without waiting.
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

/// Copies until an end of either side, or until the process ends where `exit` is given.
async fn copy(
    source: &AsyncFd<OwnedFd>,
    sink: &AsyncFd<OwnedFd>,
    exit: &mut ExitReceiver,
) -> io::Result<End> {
    loop {
        let mut guard = tokio::select! {
            biased;
            _ = exited(exit) => return Ok(End::ProcessEnded),
            guard = source.readable() => guard?,
        };
        match step(source.get_ref(), sink.get_ref(), CHUNK) {
            Step::Moved(_) => {}
            Step::WouldBlock => guard.clear_ready(),
            Step::Pending { rest, .. } => {
                if write_all(sink, &rest).await.is_err() {
                    return Ok(End::Sink);
                }
            }
            Step::SourceEnded => return Ok(End::Source),
            Step::SinkClosed => return Ok(End::Sink),
        }
    }
}

/// Output: from a pipe or terminal to the host, until its process has ended and everything that it
/// wrote has been sent.
pub(crate) async fn output(source: Endpoint, stream: Connection, mut exit: ExitReceiver) {
    let end = match copy(&source, &stream, &mut exit).await {
        Ok(end) => end,
        Err(_) => End::Source,
    };
    match end {
        // Dropping the pipe gives the process SIGPIPE, as if the reader were on this machine.
        End::Sink => return,
        End::Source => {}
        End::ProcessEnded => {
            let _ = drain(&source, &stream).await;
        }
    }
    let _ = rustix::net::shutdown(stream.get_ref(), Shutdown::Write);
    // Closing now could reset the connection under bytes that the host has not read yet. And
    // descendants of the process may still write: they must not get SIGPIPE for that.
    let linger = until_closed(&stream);
    if end == End::ProcessEnded {
        tokio::join!(linger, discard(&source));
    } else {
        drop(source);
        linger.await;
    }
}

/// Sends what was written before now. What others go on writing is not waited for.
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

/// Waits until the host has closed its side.
async fn until_closed(stream: &Connection) {
    discard(stream).await;
}

/// Reads to the end and throws it away.
pub(crate) async fn discard(source: &AsyncFd<OwnedFd>) {
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

/// Input: from the host to a pipe. Its end closes the pipe; the process closing its stdin closes
/// the connection, so that the host stops reading its own input.
pub(crate) async fn input(stream: Connection, sink: Endpoint, mut exit: ExitReceiver) {
    // A pipe that nobody reads any more becomes ready for ERROR, also while no input flows.
    let closed = async {
        let _ = sink.ready(Interest::ERROR).await;
    };
    tokio::select! {
        _ = closed => {}
        _ = copy(&stream, &sink, &mut exit) => {}
    }
}

/// Input to a pipe that is a process's standard input. The host is told, by one byte, when the process
/// first waits for it, and reads nothing of its own before.
pub(crate) async fn standard_input(stream: Connection, sink: Endpoint, mut exit: ExitReceiver) {
    let Ok(pipe) = rustix::fs::fstat(sink.get_ref()) else { return };
    tokio::select! {
        biased;
        _ = exited(&mut exit) => return,
        // Nobody can read it any more.
        _ = sink.ready(Interest::ERROR) => return,
        () = demand::comes(pipe.st_ino) => {}
    }
    if write_all(&stream, &[DEMAND]).await.is_ok() {
        input(stream, sink, exit).await;
    }
}

/// Input to a socket, which stays open for what the process writes to it.
pub(crate) async fn socket_input(stream: Connection, sink: Endpoint, mut exit: ExitReceiver) {
    if !matches!(copy(&stream, &sink, &mut exit).await, Ok(End::ProcessEnded)) {
        let _ = rustix::net::shutdown(sink.get_ref(), Shutdown::Write);
    }
}

/// Input to a terminal, which stays open when the host's input ends.
pub(crate) async fn terminal_input(stream: Connection, sink: Endpoint, mut exit: ExitReceiver) {
    if matches!(copy(&stream, &sink, &mut exit).await, Ok(End::Source)) {
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
        watch(stream.into(), Interest::READABLE | Interest::WRITABLE).unwrap()
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_was_written_before_the_exit_arrives_though_a_descendant_holds_the_pipe() {
        let (read, write) = pipe();
        let (mut host, guest) = UnixStream::pair().unwrap();
        let (exit, receiver) = watch::channel(None);
        let source = endpoint(read, Interest::READABLE).unwrap();
        let pump = tokio::spawn(output(source, connection(guest), receiver));
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
        // The descendant's writes are taken and thrown away.
        for _ in 0..64 {
            rustix::io::write(&write, &[0; 4096]).unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        drop(write);
        pump.await.unwrap();
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

//! The engine's name server in a container. The agent passes questions to the host. There the
//! engine serves the same address, in the network namespace that stands for the container's.
//!
//! A connection to the host is one question, and begins with a byte for its kind. A datagram and
//! its answer follow, each after its length, or the bytes of a stream.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use isopod_protocol::{MAX_DATAGRAM, RESOLVE_DATAGRAM, RESOLVE_STREAM, RESOLVER_PORT};
use vsock::{VMADDR_CID_HOST, VsockStream};

use crate::error::{Context as _, Result};
use crate::log::log_warn;
use crate::stream::is_transient;

/// Most questions at a time. Further ones are dropped, as a network may drop them.
const MAX_QUESTIONS: usize = 64;

/// Longest wait for an answer. Clients have repeated their question by then.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Pause when descriptors or memory have run out, in which other connections may release some.
const PAUSE: Duration = Duration::from_millis(10);

/// Stack in bytes of the threads, which need very little.
const STACK: usize = 64 * 1024;

/// Serves `address` in the network namespace of the calling thread, from threads of its own.
pub(super) fn serve(address: SocketAddr) -> Result<()> {
    let what = || format!("serve DNS at {address}");
    let datagrams = UdpSocket::bind(address).context(what)?;
    let streams = TcpListener::bind(address).context(what)?;
    let questions = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&questions);
    spawn(move || serve_datagrams(&Arc::new(datagrams), &counted)).context(what)?;
    spawn(move || serve_streams(&streams, &questions)).context(what)
}

fn spawn(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().stack_size(STACK).spawn(work).map(drop)
}

/// Runs `work` on a thread of its own, unless there are too many.
fn ask(questions: &Arc<AtomicUsize>, work: impl FnOnce() -> io::Result<()> + Send + 'static) {
    if questions.fetch_add(1, Ordering::Relaxed) >= MAX_QUESTIONS {
        questions.fetch_sub(1, Ordering::Relaxed);
        return;
    }
    let counted = Arc::clone(questions);
    let spawned = spawn(move || {
        // A failed question stays unanswered.
        let _ = work();
        counted.fetch_sub(1, Ordering::Relaxed);
    });
    if spawned.is_err() {
        questions.fetch_sub(1, Ordering::Relaxed);
    }
}

fn serve_datagrams(socket: &Arc<UdpSocket>, questions: &Arc<AtomicUsize>) {
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        match socket.recv_from(&mut buffer) {
            Ok((length, asker)) => {
                let (socket, question) = (Arc::clone(socket), buffer[..length].to_vec());
                ask(questions, move || {
                    socket.send_to(&answer(&question)?, asker)?;
                    Ok(())
                });
            }
            // A client did not wait for its answer.
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(e) if is_transient(&e) => thread::sleep(PAUSE),
            Err(e) => return log_warn!("no longer serving DNS over UDP: {e}"),
        }
    }
}

fn answer(question: &[u8]) -> io::Result<Vec<u8>> {
    let mut host = connect(RESOLVE_DATAGRAM)?;
    let length = u16::try_from(question.len()).map_err(io::Error::other)?;
    host.write_all(&length.to_be_bytes())?;
    host.write_all(question)?;
    let mut length = [0; 2];
    host.read_exact(&mut length)?;
    let mut answer = vec![0; u16::from_be_bytes(length).into()];
    host.read_exact(&mut answer)?;
    Ok(answer)
}

fn serve_streams(listener: &TcpListener, questions: &Arc<AtomicUsize>) {
    loop {
        match listener.accept() {
            Ok((stream, _)) => ask(questions, move || splice(&stream)),
            Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(e) if is_transient(&e) => thread::sleep(PAUSE),
            Err(e) => return log_warn!("no longer serving DNS over TCP: {e}"),
        }
    }
}

/// Copies both ways until both ends have closed.
fn splice(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
    let host = connect(RESOLVE_STREAM)?;
    thread::scope(|scope| {
        let back = thread::Builder::new().stack_size(STACK).spawn_scoped(scope, || {
            let result = io::copy(&mut &host, &mut &*stream);
            let _ = stream.shutdown(Shutdown::Write);
            result
        })?;
        let result = io::copy(&mut &*stream, &mut &host);
        host.shutdown(Shutdown::Write)?;
        let _ = back.join();
        result.map(drop)
    })
}

fn connect(kind: u8) -> io::Result<VsockStream> {
    let mut host = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, RESOLVER_PORT)?;
    host.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    host.set_write_timeout(Some(ANSWER_TIMEOUT))?;
    host.write_all(&[kind])?;
    Ok(host)
}

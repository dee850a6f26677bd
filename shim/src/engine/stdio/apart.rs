//! Streams of a detached exec, relayed by a process of their own. The relaying process may outlive
//! the process that stands for the guest's process. Descendants of the guest's process go on to
//! write after its end.
//!
//! ```text
//!  relay of a detached exec ── fork ──► relays until all streams have ended
//!     its process has ended: bytes written ──►
//!     ends                            ◄── these have been passed on
//! ```

use std::{
    fs,
    io::{self, BufReader, Write},
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixStream as StdUnixStream,
    },
    thread,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::oneshot,
};

use crate::{
    control::message,
    engine::stdio::streams::Streams,
    error::{Error, Explain, Result},
    logger, signals,
};

/// The process that relays the streams of another process.
#[derive(Debug)]
pub struct Apart(UnixStream);

impl Apart {
    /// Waits until each output has been passed on up to its mark: the number of bytes written when
    /// the guest's process ended. The relaying process goes on until all streams have ended.
    pub async fn written(mut self, marks: &[u64]) {
        let Ok(line) = message::line(&marks) else { return };
        // If the relaying process is gone, so are the streams.
        if self.0.write_all(&line).await.is_ok() {
            let _ = self.0.read(&mut [0]).await;
        }
    }
}

impl Streams {
    /// Starts to relay in a process of its own. `most` is the size of the guest's memory in bytes.
    ///
    /// # Errors
    ///
    /// If no process can be started, or this process has several threads.
    pub fn relay_apart(self, most: u64) -> Result<Apart> {
        let what = || "cannot start a process for the streams".to_owned();
        let (ours, theirs) = StdUnixStream::pair().explain(what)?;
        ours.set_nonblocking(true).explain(what)?;
        let ours = UnixStream::from_std(ours).explain(what)?;
        // A lock that another thread holds would stay locked in the child for ever.
        let threads = fs::read_dir("/proc/self/task").explain(what)?.count();
        if threads != 1 {
            return Err(Error::new(format!("{}: this one has {threads} threads", what())));
        }
        // SAFETY: this process has a single thread, so the child is a whole copy of it and may do
        // anything. The child never returns to the event loop, whose descriptors it closes.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()).explain(what),
            0 => self.attend(theirs, most),
            // This process's copies of the streams are closed here.
            _ => Ok(Apart(ours)),
        }
    }

    /// Relays all streams to their end, and ends the process.
    fn attend(self, socket: StdUnixStream, most: u64) -> ! {
        let mut kept = self.descriptors();
        kept.push(socket.as_raw_fd());
        kept.extend(logger::file().map(|file| file.as_raw_fd()));
        let relayed = close_all_but(&mut kept).and_then(|()| signals::ignore());
        // A thread of its own, since this thread is in the event loop of the parent.
        let thread = relayed.and_then(|()| {
            thread::Builder::new().spawn(move || self.relay_to_the_end(socket, most))
        });
        let code = match thread.map(thread::JoinHandle::join) {
            Ok(Ok(Ok(()))) => 0,
            Ok(Ok(Err(error))) => {
                log::error!("{error}");
                1
            }
            Ok(Err(_)) => 1,
            Err(error) => {
                log::error!("cannot relay streams: {error}");
                1
            }
        };
        // SAFETY: ends this process, without the cleanup of what it copied from its parent.
        unsafe { libc::_exit(code) }
    }

    fn relay_to_the_end(self, mut socket: StdUnixStream, most: u64) -> Result<()> {
        let what = || "cannot relay streams".to_owned();
        // Without a driver for descriptors: the parent's driver is closed, and signals are bound to
        // it.
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().build().explain(what)?;
        let mut relay = self.relay()?;
        let (tell, told) = oneshot::channel();
        let asked = socket.try_clone().explain(what)?;
        thread::Builder::new()
            .spawn(move || {
                let line = message::read_line(&mut BufReader::new(asked)).ok().flatten();
                let marks = line.and_then(|line| serde_json::from_slice::<Vec<u64>>(&line).ok());
                // No line arrives from a process that was killed. Then nobody is to be told.
                let _ = marks.map(|marks| tell.send(marks));
            })
            .explain(what)?;
        runtime.block_on(async {
            tokio::select! {
                marks = told => if let Ok(marks) = marks {
                    relay.written(&marks, most).await;
                    // The other process may be gone by now.
                    let _ = socket.write_all(b"\n");
                },
                // A later question finds the connection closed.
                () = relay.all_ended() => return,
            }
            relay.all_ended().await;
        });
        Ok(())
    }
}

/// Closes all descriptors of this process above the standard streams, except `kept`.
fn close_all_but(kept: &mut [RawFd]) -> io::Result<()> {
    kept.sort_unstable();
    let mut first = 3;
    for last in kept.iter().map(|fd| fd - 1).chain([RawFd::MAX]) {
        if first <= last {
            // SAFETY: only numbers are passed. The owners of the closed descriptors are never used
            // again in this process: it is a copy of another process, and only relays.
            let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
            if result < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        first = last.saturating_add(2);
    }
    Ok(())
}

//! The parent of all processes of a scope.
//!
//! `isopod-probe keeper` is a subreaper (`PR_SET_CHILD_SUBREAPER`), as conmon and containerd's shims
//! are: whatever the runtime leaves behind becomes its child. So the processes of a scope are exactly
//! the keeper's descendants, whichever sessions, cgroups or environments they moved to, tests that run
//! at the same time do not see each other's, and the exit status of an orphan is known.
//!
//! Requests and events are `SOCK_SEQPACKET` packets of JSON on the keeper's descriptor 0. When the
//! test's end closes, the keeper kills all its descendants, removes the scope's directory, and exits.
//! So that it can do this when a test program is ended from its terminal or by a signal, it is in a
//! session of its own and takes no signal that asks it to end.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, Shutdown, SockFlag, SockType, recv, sendmsg, shutdown,
    socketpair,
};
use serde::{Deserialize, Serialize};

/// Longest packet in either direction, in bytes.
pub const MAX_PACKET_LEN: usize = 64 * 1024;

/// What the keeper is asked for.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// To run a program.
    Spawn(Spawn),
    /// To send a signal to a child, unless that has ended.
    Signal {
        /// Which child.
        pid: i32,
        /// The signal's number.
        signal: i32,
    },
}

/// A program to run. Its standard input, output and error come with the packet (`SCM_RIGHTS`).
#[derive(Debug, Serialize, Deserialize)]
pub struct Spawn {
    /// The program, searched in `PATH`, and its arguments.
    pub argv: Vec<String>,
    /// Added to the keeper's own environment.
    pub env: BTreeMap<String, String>,
}

/// What the keeper reports.
#[derive(Debug, Serialize, Deserialize)]
pub enum Event {
    /// The answer to [`Request::Spawn`].
    Started {
        /// The new process.
        pid: i32,
    },
    /// The answer to [`Request::Signal`].
    Signalled {
        /// The child had not ended before.
        pid: i32,
    },
    /// The other answer to either.
    Failed {
        /// Why.
        message: String,
    },
    /// A child has ended: one that was asked for, or an orphan.
    Ended {
        /// Which.
        pid: i32,
        /// How.
        end: End,
    },
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// By `exit` with this status.
    Exited(i32),
    /// By this signal.
    Killed(i32),
}

impl End {
    /// The status as a shell shows it.
    pub fn status(self) -> i32 {
        match self {
            Self::Exited(status) => status,
            Self::Killed(signal) => 128 + signal,
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "exited with {status}"),
            Self::Killed(signal) => write!(f, "killed by signal {signal}"),
        }
    }
}

#[derive(Debug, Default)]
struct Reports {
    /// The answer to the request on its way.
    answer: Option<Result<i32, String>>,
    ended: HashMap<i32, End>,
    closed: bool,
}

type Shared = Arc<(Mutex<Reports>, Condvar)>;

/// The test's side of one keeper process.
#[derive(Debug)]
pub struct Keeper {
    process: Child,
    socket: Arc<OwnedFd>,
    reports: Shared,
    listener: Option<JoinHandle<()>>,
    /// Held during a request, so that answers need no numbers.
    requesting: Mutex<()>,
}

impl Keeper {
    /// Starts a keeper of what happens in `dir`.
    pub fn new(probe: &Path, dir: &Path) -> Self {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .expect("cannot make a socket pair");
        let process = std::process::Command::new(probe)
            .arg("keeper")
            .arg(dir)
            .stdin(Stdio::from(theirs))
            .spawn()
            .unwrap_or_else(|e| panic!("cannot run {}: {e}", probe.display()));
        let socket = Arc::new(ours);
        let reports = Shared::default();
        let listener = std::thread::spawn({
            let (socket, reports) = (Arc::clone(&socket), Arc::clone(&reports));
            move || listen(&socket, &reports)
        });
        Self { process, socket, reports, listener: Some(listener), requesting: Mutex::new(()) }
    }

    /// The keeper's own process.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.process.id()).expect("a pid")
    }

    /// Runs a program; `streams` become its standard input, output and error.
    ///
    /// # Errors
    ///
    /// Why it could not be run.
    pub fn spawn(&self, program: Spawn, streams: &[OwnedFd; 3]) -> Result<i32, String> {
        let fds = streams.each_ref().map(AsRawFd::as_raw_fd);
        self.ask(&Request::Spawn(program), &[ControlMessage::ScmRights(&fds)])
    }

    /// Sends a signal to a child. Nothing else is hit when the child has ended, for its number is not
    /// given to another process before the keeper has collected it.
    ///
    /// # Errors
    ///
    /// Why not: the child has ended, or is none.
    pub fn signal(&self, pid: i32, signal: i32) -> Result<(), String> {
        self.ask(&Request::Signal { pid, signal }, &[]).map(drop)
    }

    fn ask(&self, request: &Request, control: &[ControlMessage<'_>]) -> Result<i32, String> {
        let _one = self.requesting.lock().unwrap_or_else(|e| e.into_inner());
        let json = serde_json::to_vec(request).expect("JSON");
        let data = [std::io::IoSlice::new(&json)];
        let socket = self.socket.as_raw_fd();
        sendmsg::<()>(socket, &data, control, MsgFlags::MSG_NOSIGNAL, None)
            .map_err(|e| format!("the keeper is gone: {e}"))?;
        self.wait_for(Duration::MAX, |r| match r.answer.take() {
            None if r.closed => Some(Err("the keeper is gone".to_owned())),
            answer => answer,
        })
        .expect("an answer")
    }

    /// Waits until `holds`, at most `timeout`. Asks at first, and whenever a child has ended. `holds`
    /// must not use the keeper.
    pub fn wait_until(&self, timeout: Duration, mut holds: impl FnMut() -> bool) -> bool {
        self.wait_for(timeout, |_| holds().then_some(())).is_some()
    }

    /// Waits for the end of a child, at most `timeout`.
    pub fn wait(&self, pid: i32, timeout: Duration) -> Option<End> {
        self.wait_for(timeout, |r| r.ended.get(&pid).copied())
    }

    /// How a child ended, if it has.
    pub fn ended(&self, pid: i32) -> Option<End> {
        self.reports.0.lock().unwrap_or_else(|e| e.into_inner()).ended.get(&pid).copied()
    }

    fn wait_for<T>(
        &self,
        timeout: Duration,
        mut ready: impl FnMut(&mut Reports) -> Option<T>,
    ) -> Option<T> {
        let (mutex, changed) = &*self.reports;
        let guard = mutex.lock().unwrap_or_else(|e| e.into_inner());
        let mut found = None;
        let until = changed.wait_timeout_while(guard, timeout, |reports| {
            found = ready(reports);
            found.is_none()
        });
        drop(until);
        found
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // The keeper reads the end of the stream, kills its descendants and exits; that ends the
        // listener.
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Write);
        let gone = self.wait_for(Duration::from_secs(60), |r| r.closed.then_some(()));
        if gone.is_none() {
            eprintln!("keeper {}: its descendants do not die of SIGKILL", self.process.id());
            let _ = self.process.kill();
        }
        if let Some(listener) = self.listener.take() {
            let _ = listener.join();
        }
        let _ = self.process.wait();
    }
}

fn listen(socket: &OwnedFd, reports: &Shared) {
    let mut packet = vec![0; MAX_PACKET_LEN];
    loop {
        let len = match recv(socket.as_raw_fd(), &mut packet, MsgFlags::empty()) {
            Err(nix::errno::Errno::EINTR) => continue,
            Ok(len) => len,
            Err(_) => 0,
        };
        let mut state = reports.0.lock().unwrap_or_else(|e| e.into_inner());
        match serde_json::from_slice(&packet[..len]) {
            Ok(Event::Started { pid }) => {
                // A pid that is used again.
                state.ended.remove(&pid);
                state.answer = Some(Ok(pid));
            }
            Ok(Event::Signalled { pid }) => state.answer = Some(Ok(pid)),
            Ok(Event::Failed { message }) => state.answer = Some(Err(message)),
            Ok(Event::Ended { pid, end }) => {
                state.ended.insert(pid, end);
            }
            Err(_) => state.closed = true,
        }
        reports.1.notify_all();
        if state.closed {
            return;
        }
    }
}

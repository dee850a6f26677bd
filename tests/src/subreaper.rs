//! The parent of all processes of a scope.
//!
//! `isopod-probe subreaper` sets `PR_SET_CHILD_SUBREAPER`, as conmon and containerd's shims do. The
//! kernel makes it the parent of every orphan of the runtime. So the processes of a scope are
//! exactly the subreaper's descendants, in whatever session, cgroup or environment they are.
//! Concurrent tests do not see each other's processes, and the exit status of an orphan is known.
//!
//! Requests and events are `SOCK_SEQPACKET` packets of JSON on the subreaper's descriptor 0. When
//! the test's end closes, the subreaper kills all its descendants, removes the scope's directory,
//! and exits. The subreaper has to survive the test program, which a terminal or a signal may end.
//! So it has a session of its own and blocks the signals that ask a process to end.

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

/// A request to the subreaper.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Runs a program.
    Spawn(Spawn),
    /// Sends a signal to a child that has not ended.
    Signal {
        /// The child's pid.
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
    /// Variables added to the subreaper's own environment.
    pub env: BTreeMap<String, String>,
}

/// An answer or a report of the subreaper.
#[derive(Debug, Serialize, Deserialize)]
pub enum Event {
    /// The answer to [`Request::Spawn`].
    Started {
        /// The new process.
        pid: i32,
    },
    /// The answer to [`Request::Signal`].
    Signalled {
        /// The child, which had not ended before.
        pid: i32,
    },
    /// The answer to a request that failed.
    Failed {
        /// The reason.
        message: String,
    },
    /// The end of a child: of a requested program or of an orphan.
    Ended {
        /// The child's pid.
        pid: i32,
        /// The child's exit status or signal.
        end: End,
    },
}

/// The end of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// Exited with this status.
    Exited(i32),
    /// Killed by this signal.
    Killed(i32),
}

impl End {
    /// The status as a shell shows it: 128+n for signal n.
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
    /// The answer to the pending request.
    answer: Option<Result<i32, String>>,
    ended: HashMap<i32, End>,
    closed: bool,
}

type Shared = Arc<(Mutex<Reports>, Condvar)>;

/// The test's side of one subreaper process.
#[derive(Debug)]
pub struct Subreaper {
    process: Child,
    socket: Arc<OwnedFd>,
    reports: Shared,
    listener: Option<JoinHandle<()>>,
    /// Held during a request, so that answers need no numbers.
    requesting: Mutex<()>,
}

impl Subreaper {
    /// Starts a subreaper for the scope with the directory `dir`.
    pub fn new(probe: &Path, dir: &Path) -> Self {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .expect("cannot make a socket pair");
        let process = std::process::Command::new(probe)
            .arg("subreaper")
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

    /// The pid of the subreaper itself.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.process.id()).expect("a pid")
    }

    /// Runs a program with `streams` as its standard input, output and error.
    pub fn spawn(&self, program: Spawn, streams: &[OwnedFd; 3]) -> Result<i32, String> {
        let fds = streams.each_ref().map(AsRawFd::as_raw_fd);
        self.ask(&Request::Spawn(program), &[ControlMessage::ScmRights(&fds)])
    }

    /// Sends a signal to a child. No other process is hit, because the kernel reuses a pid only
    /// after the subreaper has collected the child.
    ///
    /// # Errors
    ///
    /// The pid is no child, or the child has ended.
    pub fn signal(&self, pid: i32, signal: i32) -> Result<(), String> {
        self.ask(&Request::Signal { pid, signal }, &[]).map(drop)
    }

    fn ask(&self, request: &Request, control: &[ControlMessage<'_>]) -> Result<i32, String> {
        let _one = self.requesting.lock().unwrap_or_else(|e| e.into_inner());
        let json = serde_json::to_vec(request).expect("JSON");
        let data = [std::io::IoSlice::new(&json)];
        let socket = self.socket.as_raw_fd();
        sendmsg::<()>(socket, &data, control, MsgFlags::MSG_NOSIGNAL, None)
            .map_err(|e| format!("the subreaper is gone: {e}"))?;
        self.wait_for(Duration::MAX, |r| match r.answer.take() {
            None if r.closed => Some(Err("the subreaper is gone".to_owned())),
            answer => answer,
        })
        .expect("an answer")
    }

    /// Waits until `holds` returns true, at most `timeout`. Calls `holds` at first and at each
    /// report. `holds` must not use the subreaper.
    pub fn wait_until(&self, timeout: Duration, mut holds: impl FnMut() -> bool) -> bool {
        self.wait_for(timeout, |_| holds().then_some(())).is_some()
    }

    /// Waits for the end of a child, at most `timeout`.
    pub fn wait(&self, pid: i32, timeout: Duration) -> Option<End> {
        self.wait_for(timeout, |r| r.ended.get(&pid).copied())
    }

    /// The end of a child; `None` while it runs.
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

impl Drop for Subreaper {
    fn drop(&mut self) {
        // The subreaper reads the end of the stream, kills its descendants and exits. Its exit ends
        // the listener.
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Write);
        let gone = self.wait_for(Duration::from_secs(60), |r| r.closed.then_some(()));
        if gone.is_none() {
            eprintln!("subreaper {}: its descendants do not die of SIGKILL", self.process.id());
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
                // The kernel may reuse a pid.
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

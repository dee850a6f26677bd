//! The streams of a process, and its output.

use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use isopod_protocol::agent::{ProcessExit, StreamTokens};

/// A started process's streams, each read to its end by a thread.
pub(crate) struct Io {
    pub(crate) tokens: StreamTokens,
    pub(crate) stdin: UnixStream,
    pub(crate) out: JoinHandle<Vec<u8>>,
    pub(crate) err: JoinHandle<Vec<u8>>,
}

/// Exit and output of a process.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) exit: ProcessExit,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Io {
    /// Returns all output, once both outputs have ended.
    pub(crate) async fn finish(self, exit: ProcessExit) -> Outcome {
        drop(self.stdin);
        let read = move || {
            let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
            (text(self.out.join().unwrap()), text(self.err.join().unwrap()))
        };
        let (out, err) = tokio::task::spawn_blocking(read).await.unwrap();
        Outcome { exit, out, err }
    }

    pub(crate) async fn bytes(self) -> Vec<u8> {
        drop(self.stdin);
        tokio::task::spawn_blocking(move || self.out.join().unwrap()).await.unwrap()
    }
}

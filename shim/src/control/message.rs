//! Messages of the control socket. Each is a line of JSON.

use std::io::{BufRead, Read, Write};

use oci_spec::runtime::LinuxResources;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufRead, AsyncBufReadExt};

use crate::{error::Error, state::Exit, terminal::Size, timeline::Timeline};

/// Longest message in either direction, in bytes.
pub const MAX_MESSAGE_LEN: usize = 64 * 1024;

/// A request to a sandbox process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "request")]
pub enum Request {
    /// Starts the container's process.
    Start,
    /// Sends a signal to the container's process, or to all processes of the container.
    Kill {
        /// Number of the signal, 0 to 64. 0 only checks that the process is there.
        signal: u32,
        /// True for every process of the container.
        all: bool,
    },
    /// Ends the container and the microVM, whatever the state. The answer comes at once. The work
    /// is done when the sandbox process ends.
    Destroy,
    /// Waits for the end of the container. The answer is [`Message::Ended`]: the microVM is gone by
    /// then, and the sandbox process is about to end.
    Wait,
    /// Pauses the container's processes.
    Pause,
    /// Resumes the container's processes.
    Resume,
    /// Changes the container's limits.
    Update {
        /// The limits to change. Processors are those of the host.
        resources: Box<LinuxResources>,
    },
    /// Gives the container's terminal a new size.
    Resize {
        /// The new size.
        size: Size,
    },
}

/// A message of a sandbox process.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "message")]
pub enum Message {
    /// The container is created.
    Created,
    /// The request was carried out.
    Done,
    /// The creation or a request failed.
    Failed {
        /// The reason.
        error: Error,
    },
    /// The container has ended, and the sandbox process is about to end.
    Ended(Box<Ended>),
}

/// The end of a container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ended {
    /// The exit, if it is known.
    pub exit: Option<Exit>,
    /// Reason why there is no exit.
    pub error: Option<Error>,
    /// Times of the container's steps.
    pub timeline: Timeline,
}

/// Encodes a message as a line.
pub fn line(message: &impl Serialize) -> std::io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

/// Sends one message.
pub fn send(socket: &mut impl Write, message: &impl Serialize) -> std::io::Result<()> {
    socket.write_all(&line(message)?)
}

/// Reads one line, with its newline; `None` at the end of the connection. A line that is cut off or
/// longer than [`MAX_MESSAGE_LEN`] is an error.
pub fn read_line(socket: &mut impl BufRead) -> std::io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    socket.take(MAX_MESSAGE_LEN as u64).read_until(b'\n', &mut line)?;
    whole(line)
}

/// As [`read_line`]. If the future is dropped, `line` keeps the bytes read so far for the next call.
pub(crate) async fn next_line(
    reader: &mut (impl AsyncBufRead + Unpin),
    line: &mut Vec<u8>,
) -> std::io::Result<Option<Vec<u8>>> {
    let left = MAX_MESSAGE_LEN.saturating_sub(line.len());
    tokio::io::AsyncReadExt::take(reader, left as u64).read_until(b'\n', line).await?;
    whole(std::mem::take(line))
}

/// Tells a whole line from the end of the connection and from a part of a line.
fn whole(line: Vec<u8>) -> std::io::Result<Option<Vec<u8>>> {
    match line {
        line if line.is_empty() => Ok(None),
        line if line.ends_with(b"\n") => Ok(Some(line)),
        _ => Err(std::io::Error::other("a message is cut off or too long")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_bounded() {
        let mut long = std::io::Cursor::new(vec![b'a'; MAX_MESSAGE_LEN * 2]);
        assert!(read_line(&mut long).is_err());
        let mut cut = std::io::Cursor::new(b"abc".to_vec());
        assert!(read_line(&mut cut).is_err());
        let mut empty = std::io::Cursor::new(Vec::new());
        assert_eq!(read_line(&mut empty).unwrap(), None);
    }
}

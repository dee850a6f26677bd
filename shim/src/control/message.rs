//! Messages of the control socket. Each is a line of JSON.

use std::io::{BufRead, Read, Write};

use serde::{Deserialize, Serialize};

use crate::{
    bundle::GuestContainer,
    container_id::ContainerId,
    engine::{Ended, ExecSpec, IoPlan, ProcessInfo, Record, Request, RuntimeNamespacePlan},
    error::Error,
    figures::Figures,
    microvm::share::TreesPlan,
    state::Exit,
    stats::Stats,
    timeline::Timeline,
};

/// Longest message in either direction, in bytes: a config.json, or a long list of processes.
pub(crate) const MAX_MESSAGE_LEN: usize = 32 << 20;

/// A call to a sandbox process, about one of its containers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Call {
    /// Id of the container.
    pub container: ContainerId,
    /// The call itself.
    pub verb: Verb,
}

/// A call to a sandbox process.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Verb {
    /// Has a request carried out. The answer is [`Message::Done`].
    Ask(Request),
    /// Waits for the end of the container. The answer is [`Message::Ended`].
    Wait,
    /// Lists the processes. The answer is [`Message::Processes`].
    Processes,
    /// Reads the resource use. The answer is [`Message::Stats`].
    Stats,
    /// Reads figures of the sandbox for its operator. The answer is [`Message::Figures`].
    Figures,
    /// Waits for a kill at the memory limit, or the end. The answer is [`Message::Oom`].
    WaitOom {
        /// Number of kills that the client knows of.
        seen: u64,
    },
    /// Runs a further process. Beside the message come the descriptors of its streams. The answer is
    /// [`Message::Created`], and [`Message::Exited`] at the end. When the client goes, the process
    /// is killed.
    Exec {
        /// The process.
        spec: Box<ExecSpec>,
        /// Its streams.
        io: IoPlan,
    },
    /// Makes a further container in the microVM. Beside the message come the descriptors of its
    /// streams, of its namespaces for hooks, of its trees and of its disks. The answer is
    /// [`Message::Created`], and [`Message::Ended`] at the end. When the client goes, the container
    /// is ended.
    Create(Box<Create>),
    /// Keeps the microVM of a holder until the client goes. The answer is [`Message::Done`], or none
    /// if the microVM is ending.
    Hold,
    /// Passes a signal or a size on to the process whose end the client waits for, after
    /// [`Self::Exec`] or [`Self::Create`]. Has no answer.
    PassOn(Request),
}

/// A further container of a microVM.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Create {
    /// The record as the client has written it.
    pub record: Record,
    /// State directory of the container.
    pub dir: std::path::PathBuf,
    /// The container as the agent makes it.
    pub guest: GuestContainer,
    /// Streams of the first process.
    pub io: IoPlan,
    /// True if the output is to end with the reason for a loss of the microVM.
    pub loss_notice: bool,
    /// Surroundings that hooks run in, if there are hooks.
    pub origin: Option<RuntimeNamespacePlan>,
    /// The trees.
    pub trees: TreesPlan,
    /// For each disk of `guest`, true if the guest may only read.
    pub read_only_disks: Vec<bool>,
    /// Times of the steps so far.
    pub timeline: Timeline,
}

/// A message of a sandbox process.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Message {
    /// The container is created, or the process is started.
    Created,
    /// The request was carried out.
    Done,
    /// The call failed.
    Failed(Error),
    /// The container has ended. If it is the first of its sandbox, the microVM is gone too, and the
    /// sandbox process is about to end.
    Ended(Box<Ended>),
    /// The process has ended.
    Exited(Exit),
    /// The processes of the container.
    Processes(Vec<ProcessInfo>),
    /// The resource use of the container.
    Stats(Box<Stats>),
    /// Figures of the sandbox.
    Figures(Box<Figures>),
    /// Kills at the memory limit.
    Oom {
        /// Their number.
        count: u64,
        /// True if the container has ended.
        ended: bool,
    },
}

/// Encodes a message as a line.
pub(crate) fn line(message: &impl Serialize) -> std::io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

/// Sends one message.
pub(crate) fn send(socket: &mut impl Write, message: &impl Serialize) -> std::io::Result<()> {
    socket.write_all(&line(message)?)
}

/// Reads one line, with its newline; `None` at the end of the connection. A line that is cut off or
/// longer than [`MAX_MESSAGE_LEN`] is an error.
pub(crate) fn read_line(socket: &mut impl BufRead) -> std::io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    socket.take(MAX_MESSAGE_LEN as u64).read_until(b'\n', &mut line)?;
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
        let mut long = std::io::Cursor::new(vec![b'a'; MAX_MESSAGE_LEN + 10]);
        assert!(read_line(&mut long).is_err());
        let mut cut = std::io::Cursor::new(b"abc".to_vec());
        assert!(read_line(&mut cut).is_err());
        let mut empty = std::io::Cursor::new(Vec::new());
        assert_eq!(read_line(&mut empty).unwrap(), None);
    }
}

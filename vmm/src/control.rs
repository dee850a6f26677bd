//! What the sandbox process can ask of a running VMM, and what the VMM reports.
//!
//! Each message is one `SOCK_SEQPACKET` packet of JSON on [`crate::config::VmConfig::control_fd`],
//! at most [`MAX_MESSAGE_LEN`] bytes. The sandbox process sends [`VmmAction`]s and gets one
//! [`VmmMessage::Reply`] for each, in order; [`VmmMessage::Event`]s come in between, unasked. When
//! the sandbox process closes its end, the VMM ends the microVM and exits.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Longest message in either direction, in bytes.
pub const MAX_MESSAGE_LEN: usize = 32 * 1024;

/// How long a sandbox process may leave its end unread before it counts as gone, so that the VMM
/// always ends when it has to.
pub const SEND_LIMIT: Duration = Duration::from_secs(5);

/// Everything that can be asked of a VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "action")]
pub enum VmmAction {
    /// Report [`VmmReply::Status`].
    Status,
    /// Stop all vCPUs before their next guest instruction.
    Pause,
    /// Let paused vCPUs run on.
    Resume,
    /// End the microVM now, without telling the guest.
    Stop,
}

/// The answer to one [`VmmAction`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "reply")]
pub enum VmmReply {
    /// Done.
    Done,
    /// To [`VmmAction::Status`].
    Status {
        /// vCPUs are paused.
        paused: bool,
        /// VM exits since the start, by kind, without zeros.
        exits: std::collections::BTreeMap<String, u64>,
        /// Memory of the VMM process in KiB that is resident and not guest memory.
        overhead_kib: u64,
        /// Guest memory in KiB that is resident on the host.
        guest_resident_kib: u64,
    },
    /// Could not be done.
    Failed {
        /// Why.
        message: String,
    },
}

/// Something that happened without being asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "event")]
pub enum VmmEvent {
    /// The vCPUs are about to run their first instruction. Times are `CLOCK_MONOTONIC` microseconds.
    Started {
        /// `main` began.
        exec_us: u64,
        /// Kernel and image are in guest memory, devices are built, the jail is entered.
        running_us: u64,
    },
    /// The guest's kernel knows of so many files that it should be asked to forget those that nothing
    /// uses. Sent again after some seconds if it still knows of more.
    FilesHigh,
    /// The microVM has ended; the VMM exits after this message.
    Ended {
        /// Why.
        reason: EndReason,
        /// The last lines of the guest's console, oldest first. Guest-controlled text, in which each
        /// control or format character has become a `.`.
        console_tail: Vec<String>,
    },
    /// The VMM could not start the microVM; it exits after this message.
    Failed {
        /// One line for a person: what failed, with what, and why.
        message: String,
    },
}

/// Why a microVM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum EndReason {
    /// The guest asked for a reset or power-off, which is how it shuts down.
    GuestShutdown,
    /// The guest's console shows a kernel panic before it reset.
    GuestPanic,
    /// A vCPU triple-faulted (`KVM_EXIT_SHUTDOWN`).
    TripleFault,
    /// KVM could not go on with a vCPU: `KVM_EXIT_INTERNAL_ERROR`, `KVM_EXIT_FAIL_ENTRY`, or an
    /// error of `KVM_RUN`.
    VcpuFailed {
        /// What KVM said.
        message: String,
    },
    /// [`VmmAction::Stop`], or the sandbox process went away.
    Stopped,
    /// A device or thread of the VMM failed.
    VmmFailed {
        /// What failed.
        message: String,
    },
}

/// What the VMM sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmmMessage {
    /// To an action.
    Reply(VmmReply),
    /// On its own.
    Event(VmmEvent),
}

/// The VMM's end of the control socket.
pub struct ControlSocket(UnixDatagram);

impl ControlSocket {
    /// Takes the descriptor of a connected `SOCK_SEQPACKET` socket.
    pub fn new(fd: OwnedFd) -> Self {
        let socket = UnixDatagram::from(fd);
        // It fails on what is no socket, and so does all that follows.
        let _ = socket.set_write_timeout(Some(SEND_LIMIT));
        Self(socket)
    }

    /// Receives one action. `Ok(None)` when the sandbox process has closed its end.
    ///
    /// # Errors
    ///
    /// When the packet is no action; the sandbox process is then not to be trusted to steer.
    pub fn receive(&self) -> io::Result<Option<VmmAction>> {
        let mut packet = vec![0u8; MAX_MESSAGE_LEN];
        let len = self.0.recv(&mut packet)?;
        if len == 0 {
            return Ok(None);
        }
        Ok(Some(serde_json::from_slice(&packet[..len])?))
    }

    /// Sends one message.
    ///
    /// # Errors
    ///
    /// When the sandbox process has closed its end, or reads nothing for [`SEND_LIMIT`].
    pub fn send(&self, message: &VmmMessage) -> io::Result<()> {
        let packet = serde_json::to_vec(message)?;
        self.0.send(&packet).map(drop)
    }
}

impl AsRawFd for ControlSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

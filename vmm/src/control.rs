//! Messages between the sandbox process and a running VMM.
//!
//! Each message is one `SOCK_SEQPACKET` packet of JSON on [`crate::config::VmConfig::control_fd`],
//! at most [`MAX_MESSAGE_LEN`] bytes. The sandbox process sends [`VmmAction`]s. Each gets one
//! [`VmmMessage::Reply`], in order. [`VmmMessage::Event`]s come in between, without a request. When
//! the sandbox process closes its end, the VMM ends the microVM and exits.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Longest message in either direction, in bytes.
pub const MAX_MESSAGE_LEN: usize = 32 * 1024;

/// Time for which the sandbox process may leave its end unread. After that it counts as gone,
/// so that the VMM can always end.
pub const SEND_LIMIT: Duration = Duration::from_secs(5);

/// Requests of the sandbox process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "action")]
pub enum VmmAction {
    /// Reports [`VmmReply::Status`].
    Status,
    /// Stops all vCPUs before their next guest instruction.
    Pause,
    /// Continues paused vCPUs.
    Resume,
    /// Puts a disk into a slot. The descriptor of the disk comes with the message (`SCM_RIGHTS`).
    /// Answered by [`VmmReply::Attached`].
    AttachDisk {
        /// Number of the slot, less than [`crate::config::VmConfig::disk_slots`].
        slot: u8,
        /// Path by which the disk was opened, for messages.
        path: String,
        /// True if the guest may not write.
        read_only: bool,
    },
    /// Takes a disk out of its slot, and closes it. The guest should have given it up before.
    DetachDisk {
        /// Number of the slot.
        slot: u8,
    },
    /// Ends the microVM now, without a message to the guest.
    Stop,
}

/// The answer to one [`VmmAction`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "reply")]
pub enum VmmReply {
    /// The action is done.
    Done,
    /// Answer to [`VmmAction::Status`].
    Status {
        /// True while the vCPUs are paused.
        paused: bool,
        /// VM exits since the start, by kind. Kinds without an exit are left out.
        exits: std::collections::BTreeMap<String, u64>,
        /// Resident memory of the VMM process in KiB, without guest memory.
        overhead_kib: u64,
        /// Resident guest memory in KiB.
        guest_resident_kib: u64,
        /// Requests to the file system device since the start, by class. Classes without a request
        /// are left out.
        fs_requests: std::collections::BTreeMap<String, u64>,
        /// Bytes of data in the streams of the socket device since the start, to the guest.
        stream_bytes_to_guest: u64,
        /// The same, from the guest.
        stream_bytes_to_host: u64,
    },
    /// Answer to [`VmmAction::AttachDisk`].
    Attached {
        /// Number of the virtio-mmio device in the guest: `virtio-mmio.<number>` of its platform
        /// bus.
        number: u32,
    },
    /// The action failed.
    Failed {
        /// The cause.
        message: String,
    },
}

/// Messages without a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "event")]
pub enum VmmEvent {
    /// The vCPUs are about to run their first instruction. Times are `CLOCK_MONOTONIC` in
    /// microseconds.
    Started {
        /// Time at the start of `main`.
        exec_us: u64,
        /// Time when kernel and image were loaded, the devices built and the jail entered.
        running_us: u64,
    },
    /// The guest's kernel knows of so many files that it should forget the unused ones. The event
    /// repeats after some seconds while their number stays high.
    FilesHigh,
    /// The microVM has ended; the VMM exits after this message.
    Ended {
        /// The cause.
        reason: EndReason,
        /// The last lines of the guest's console, oldest first. The guest controls the text; each
        /// control or format character in it has become a `.`.
        console_tail: Vec<String>,
    },
    /// The VMM could not start the microVM; it exits after this message.
    Failed {
        /// One line for a person: what failed, with what, and why.
        message: String,
    },
}

/// Reasons why a microVM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum EndReason {
    /// The guest asked for a reset or power-off. A guest shuts down by a reset.
    GuestShutdown,
    /// The guest's console showed a kernel panic before the reset.
    GuestPanic,
    /// A vCPU triple-faulted (`KVM_EXIT_SHUTDOWN`).
    TripleFault,
    /// KVM could not continue a vCPU: `KVM_EXIT_INTERNAL_ERROR`, `KVM_EXIT_FAIL_ENTRY`, or an error
    /// of `KVM_RUN`.
    VcpuFailed {
        /// KVM's error.
        message: String,
    },
    /// The sandbox process sent [`VmmAction::Stop`], or is gone.
    Stopped,
    /// A device or thread of the VMM failed.
    VmmFailed {
        /// The failure.
        message: String,
    },
}

/// Messages of the VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmmMessage {
    /// The answer to an action.
    Reply(VmmReply),
    /// A message without a request.
    Event(VmmEvent),
}

/// The VMM's end of the control socket.
pub struct ControlSocket(UnixDatagram);

impl ControlSocket {
    /// Takes the descriptor of a connected `SOCK_SEQPACKET` socket.
    pub fn new(fd: OwnedFd) -> Self {
        let socket = UnixDatagram::from(fd);
        // The call fails only on a descriptor that is not a socket, on which all later calls fail
        // too.
        let _ = socket.set_write_timeout(Some(SEND_LIMIT));
        Self(socket)
    }

    /// Receives one action, and the descriptor that came with it. `Ok(None)` when the sandbox
    /// process has closed its end.
    ///
    /// # Errors
    ///
    /// When the packet is not an action. The sandbox process cannot be trusted to steer then.
    pub fn receive(&self) -> io::Result<Option<(VmmAction, Option<File>)>> {
        let mut packet = vec![0u8; MAX_MESSAGE_LEN];
        let received = self.0.recv_with_fd(&mut packet);
        let (len, file) = received.map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        if len == 0 {
            return Ok(None);
        }
        Ok(Some((serde_json::from_slice(&packet[..len])?, file)))
    }

    /// Sends one message.
    ///
    /// # Errors
    ///
    /// When the sandbox process has closed its end, or has read nothing for [`SEND_LIMIT`].
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

//! Requests to the task that owns a container, and the container's end.

use std::os::fd::OwnedFd;

use oci_spec::runtime::LinuxResources;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::{
    error::{Error, Result},
    signals::WINCH,
    state::Exit,
    terminal::{self, Size},
    timeline::Timeline,
};

/// A request to the task that owns a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Request {
    /// Starts the container's process.
    Start,
    /// Sends a signal to the container's process, or to all processes of the container.
    Kill {
        /// Number of the signal, 0 to 64. 0 only checks that the process is there.
        signal: u32,
        /// True for every process of the container.
        all: bool,
    },
    /// Ends the container, whatever the state. The answer comes at once. The work is done when the
    /// container has ended.
    Destroy,
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

impl Request {
    /// The request by which a process that stands for one in the guest passes a signal on.
    /// `SIGWINCH` is not passed on: the terminal in the guest gets the size of the host's, whose end
    /// is `console`. `None` if there is nothing to pass on.
    pub(crate) fn of_signal(number: u32, console: Option<&OwnedFd>) -> Option<Self> {
        if number != WINCH {
            return Some(Self::Kill { signal: number, all: false });
        }
        let size = console.and_then(terminal::size).filter(|size| *size != Size::default());
        size.map(|size| Self::Resize { size })
    }
}

/// A request, and the channel for its answer. The channel is dropped without an answer when the
/// container has ended.
#[derive(Debug)]
pub(crate) struct Command {
    pub(crate) request: Request,
    pub(crate) answer: oneshot::Sender<Result<()>>,
}

/// The end of a container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Ended {
    /// The exit, if it is known.
    pub exit: Option<Exit>,
    /// Reason why there is no exit.
    pub error: Option<Error>,
    /// Times of the container's steps.
    pub timeline: Timeline,
}

impl Ended {
    /// The exit status of a process that stands for the container.
    pub(crate) fn exit_code(&self) -> u8 {
        match (&self.exit, &self.error) {
            (Some(exit), _) => exit.status,
            (None, Some(error)) => error.exit_code(),
            (None, None) => 1,
        }
    }
}

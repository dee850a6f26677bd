//! The status of a container, and the end of its process.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The status of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// The microVM boots and the container is built.
    Creating,
    /// The container's process waits to be started.
    Created,
    /// The container's process runs.
    Running,
    /// The container's processes are stopped until they are resumed.
    Paused,
    /// The container's process has ended, or the microVM has.
    Stopped,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// The end of a container's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit status, 128 + n after signal n.
    pub status: u8,
    /// The kernel killed a process of the container for its memory limit.
    pub oom_killed: bool,
}

impl Exit {
    /// The exit of a process that SIGKILL has ended.
    pub const KILLED: Self = Self { status: 128 + 9, oom_killed: false };
}

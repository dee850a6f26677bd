//! A process of a container, as its guest reports it.

use isopod_protocol::agent;
use serde::{Deserialize, Serialize};

/// A process of a container, as its guest reports it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessInfo {
    /// Pid in the guest's root pid namespace.
    pub pid: u32,
    /// Pid in the container's pid namespace.
    pub container_pid: u32,
    /// Parent's pid in the container's pid namespace; 0 for a parent outside.
    pub container_parent_pid: u32,
    /// Effective user id, in the guest's root user namespace.
    pub uid: u32,
    /// `uid` in the process's own user namespace.
    pub container_uid: u32,
    /// Device number of the terminal as in proc_pid_stat(5); 0 without a terminal.
    pub terminal: u32,
    /// Wall clock of the guest at the start, in milliseconds since the epoch.
    pub start_time_ms: u64,
    /// Time since the start, in milliseconds.
    pub age_ms: u64,
    /// Processor time in user and kernel mode, in milliseconds.
    pub cpu_time_ms: u64,
    /// Name of the program.
    pub name: String,
    /// Arguments. A container with very many loses the last ones.
    pub args: Vec<String>,
}

impl From<agent::ProcessInfo> for ProcessInfo {
    fn from(process: agent::ProcessInfo) -> Self {
        Self {
            pid: process.pid,
            container_pid: process.container_pid,
            container_parent_pid: process.container_parent_pid,
            uid: process.uid,
            container_uid: process.container_uid,
            terminal: process.terminal,
            start_time_ms: process.start_time_ms,
            age_ms: process.age_ms,
            cpu_time_ms: process.cpu_time_ms,
            name: process.name,
            args: process.args,
        }
    }
}

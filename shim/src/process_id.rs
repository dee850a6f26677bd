//! Processes by pid and start time, so that a reused pid is never taken for the intended process.

use std::{fs, os::fd::OwnedFd, time::Duration};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Signal},
};
use serde::{Deserialize, Serialize};

/// A process of this boot of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Pid in the pid namespace of the reader.
    pub pid: i32,
    /// Start time in clock ticks since boot (`/proc/<pid>/stat`, field 22).
    pub start_time: u64,
}

impl ProcessId {
    /// The process that has this pid now, if there is one that has not ended.
    pub fn of(pid: i32) -> Option<Self> {
        let start_time = start_time(pid)?;
        Some(Self { pid, start_time })
    }

    /// This process.
    pub fn own() -> Option<Self> {
        Self::of(i32::try_from(std::process::id()).ok()?)
    }

    /// Tells whether the process exists and has not ended. A zombie has ended.
    pub fn is_alive(self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }

    /// A pidfd of the process, if the process exists.
    fn pidfd(self) -> Option<OwnedFd> {
        let fd = rustix::process::pidfd_open(Pid::from_raw(self.pid)?, PidfdFlags::empty()).ok()?;
        // Checked after the open: if the process is alive now, the pidfd is that of this process.
        self.is_alive().then_some(fd)
    }

    /// Waits until the process has ended. False if it still runs after `timeout`.
    pub fn wait(self, timeout: Duration) -> bool {
        let Some(fd) = self.pidfd() else { return true };
        let deadline = std::time::Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            let left = Timespec::try_from(left).ok();
            match poll(&mut [PollFd::new(&fd, PollFlags::IN)], left.as_ref()) {
                Ok(0) => return false,
                Ok(_) => return true,
                Err(Errno::INTR) => {}
                Err(_) => return !self.is_alive(),
            }
        }
    }

    /// Sends SIGCONT to the process if a signal has stopped it.
    pub fn let_go_on(self) {
        if let Some(fd) = self.pidfd().filter(|_| state(self.pid) == Some('T')) {
            // The process may have ended in between, or go on by itself.
            let _ = rustix::process::pidfd_send_signal(fd, Signal::CONT);
        }
    }

    /// Asks the process to end, and kills it after `timeout`. False if it still runs after another
    /// `timeout`.
    pub fn end(self, timeout: Duration) -> bool {
        let Some(fd) = self.pidfd() else { return true };
        // The process may have ended in between, and that was wanted.
        let _ = rustix::process::pidfd_send_signal(fd, Signal::TERM);
        self.wait(timeout) || self.kill(timeout)
    }

    /// Kills the process and waits until it has ended. False if it still runs after `timeout`.
    pub fn kill(self, timeout: Duration) -> bool {
        let Some(fd) = self.pidfd() else { return true };
        // The process may have ended in between, and that was wanted.
        let _ = rustix::process::pidfd_send_signal(fd, Signal::KILL);
        self.wait(timeout)
    }
}

/// The state of a process (proc_pid_stat(5)).
fn state(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.get(stat.rfind(')')? + 1..)?.trim_start().chars().next()
}

/// The start time of a process, or `None` if the process does not exist or has ended.
fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything, parentheses and spaces included.
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace();
    let state = fields.next()?;
    // proc_pid_stat(5): the state is field 3, the number of threads 20, the start time 22.
    let threads: u64 = fields.nth(16)?.parse().ok()?;
    let start_time = fields.nth(1)?.parse().ok()?;
    // A first thread that has ended is a zombie until the last thread has ended. Until then the
    // files of the process stay open.
    let ended = matches!(state, "Z" | "X" | "x") && threads <= 1;
    (!ended).then_some(start_time)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_process_is_alive_until_it_ends() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let id = ProcessId::of(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(id.is_alive());
        assert!(!id.wait(Duration::from_millis(10)));
        assert!(id.kill(Duration::from_secs(10)));
        // Not reaped yet: a zombie has ended.
        assert!(!id.is_alive());
        assert!(id.wait(Duration::ZERO));
        child.wait().unwrap();
        assert!(!id.is_alive());
    }

    #[test]
    fn another_process_with_the_same_pid_is_not_it() {
        let own = ProcessId::own().unwrap();
        assert!(own.is_alive());
        let other = ProcessId { start_time: own.start_time + 1, ..own };
        assert!(!other.is_alive());
        assert!(other.kill(Duration::ZERO), "nobody is killed");
    }
}

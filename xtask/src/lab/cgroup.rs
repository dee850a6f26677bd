//! Cgroups of the lab's commands: one for each command.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use nix::poll::{PollFd, PollFlags, poll};

/// Mount point of the cgroup v2 hierarchy.
pub(super) const CGROUP: &str = "/sys/fs/cgroup";

/// Longest wait in milliseconds for the end of killed processes.
const KILL_TIME: u16 = 30_000;

/// Creates the cgroup of the command `name`.
pub(super) fn create(name: &str) -> Result<PathBuf> {
    let cgroup = PathBuf::from(CGROUP).join(format!("run-{name}"));
    fs::create_dir(&cgroup).with_context(|| format!("cannot create {}", cgroup.display()))?;
    Ok(cgroup)
}

/// Kills all processes of a cgroup and waits until none is left, or until [`KILL_TIME`] is over.
pub(super) fn kill(cgroup: &Path) {
    let kill = cgroup.join("cgroup.kill");
    match fs::write(&kill, "1") {
        Ok(()) => await_empty(cgroup),
        Err(error) => eprintln!("lab: cannot write {}: {error}", kill.display()),
    }
}

/// Waits until no process is left in the cgroup.
fn await_empty(cgroup: &Path) {
    let events = cgroup.join("cgroup.events");
    while let Ok(mut file) = File::open(&events) {
        let mut text = String::new();
        // Reading `cgroup.events` arms the notification for POLLPRI.
        if file.read_to_string(&mut text).is_err() || text.contains("populated 0") {
            return;
        }
        let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
        if poll(&mut fds, KILL_TIME).is_ok_and(|n| n == 0) {
            eprintln!("lab: processes in {} do not end", cgroup.display());
            return;
        }
    }
}

/// Removes a cgroup, unless it still has processes.
pub(super) fn remove(cgroup: &Path) {
    // Fails if the command left a daemon behind: the daemon keeps the cgroup.
    let _ = fs::remove_dir(cgroup);
}

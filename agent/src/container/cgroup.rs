//! The guest's cgroup v2 tree: one group for each container below `containers`.
//!
//! The agent stays in the root group, out of reach of every container's limits. A group of its own
//! would protect the agent no better and would cost an RCU grace period at boot. The limits of
//! `containers` as a whole reserve memory and pids for the agent.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use isopod_protocol::text::seconds;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::{Context as _, Error, Result};
use crate::log::log_warn;

/// Mount point of cgroup v2 in the guest.
pub(crate) const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Parent of all containers' groups.
const CONTAINERS: &str = "/sys/fs/cgroup/containers";

/// Memory in bytes that containers cannot take from the agent and the kernel.
const MEMORY_RESERVE: u64 = 32 << 20;

/// Processes and threads that containers cannot take from the agent.
const PIDS_RESERVE: u64 = 256;

/// Deepest level of groups made by a container that [`Cgroup::remove`] still cleans up.
const MAX_DEPTH: usize = 64;

/// Longest time until killed processes have disappeared.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest time until the processes of a group have stopped. A process in an uninterruptible call
/// stops only after the call.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(10);

/// Enables every controller for containers and bounds their total use.
pub(crate) fn prepare() -> Result<()> {
    let containers = Path::new(CONTAINERS);
    fs::create_dir_all(containers).context(|| format!("create {CONTAINERS}"))?;
    delegate(Path::new(CGROUP_ROOT))?;
    delegate(containers)?;
    let total = rustix::system::sysinfo();
    let total = (total.totalram as u64).saturating_mul(u64::from(total.mem_unit));
    let memory = total - MEMORY_RESERVE.min(total / 8);
    let pids = pid_space().saturating_sub(PIDS_RESERVE);
    let limits = [
        ("memory.max", memory.to_string()),
        ("pids.max", pids.to_string()),
        // The kernel counts a child's memory.low only up to its parent's.
        ("memory.low", "max".to_owned()),
    ];
    for (file, value) in limits {
        let path = containers.join(file);
        // The file is missing if the kernel lacks the controller.
        if path.exists() {
            write_file(&path, &value)?;
        }
    }
    Ok(())
}

/// Most processes and threads that this kernel supports at a time.
fn pid_space() -> u64 {
    let limit = |name| {
        let text = fs::read_to_string(name).ok()?;
        text.trim().parse::<u64>().ok()
    };
    let threads = limit("/proc/sys/kernel/threads-max").unwrap_or(u64::MAX);
    threads.min(limit("/proc/sys/kernel/pid_max").unwrap_or(32768))
}

/// Enables all controllers of a group for its children.
fn delegate(group: &Path) -> Result<()> {
    let path = group.join("cgroup.controllers");
    let controllers = fs::read_to_string(&path).context(|| format!("read {}", path.display()))?;
    let enable: String = controllers.split_whitespace().map(|c| format!("+{c} ")).collect();
    if enable.is_empty() {
        return Ok(());
    }
    write_file(&group.join("cgroup.subtree_control"), enable.trim_end())
}

/// Writes an interface file in one write(2), as the kernel requires.
fn write_file(path: &Path, value: &str) -> Result<()> {
    let write = || fs::File::options().write(true).open(path)?.write_all(value.as_bytes());
    write().context(|| format!("write {value:?} to {}", path.display()))
}

/// The group of one container.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    dir: OwnedFd,
    /// True while the group is frozen by [`Cgroup::pause`]. The lock is held while the freezer
    /// changes.
    paused: Mutex<bool>,
}

impl Cgroup {
    /// Makes the group of a container. A group that exists already is an error.
    pub(crate) fn create(container_id: &str) -> Result<Self> {
        let path = Path::new(CONTAINERS).join(container_id);
        fs::create_dir(&path).context(|| format!("create the cgroup {}", path.display()))?;
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(dir) => Ok(Self { path, dir, paused: Mutex::default() }),
            Err(e) => {
                let _ = fs::remove_dir(&path);
                Err(e).context(|| format!("open the cgroup {}", path.display()))
            }
        }
    }

    /// Id of the container that the group belongs to.
    pub(crate) fn id(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn dir(&self) -> &OwnedFd {
        &self.dir
    }

    /// Opens the group at a path below this group; `/` names this group itself. A path that leads
    /// out of the group is an error.
    pub(crate) fn below(&self, path: &str) -> Result<OwnedFd> {
        let below = Path::new(".").join(path.trim_start_matches('/'));
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(&self.dir, &below, flags, Mode::empty(), resolve).map_err(|e| {
            let why = match e {
                Errno::NOENT | Errno::NOTDIR => "there is no such cgroup in the container",
                Errno::XDEV => "it leads out of the container's cgroup",
                e => {
                    return Error::invalid(
                        format!("cgroup {path:?}"),
                        crate::error::reason(&e.into()),
                    );
                }
            };
            Error::invalid(format!("cgroup {path:?}"), why)
        })
    }

    pub(crate) fn has(&self, file: &str) -> bool {
        self.path.join(file).exists()
    }

    /// Reads an interface file, without the end of its last line.
    pub(crate) fn read(&self, file: &str) -> Result<String> {
        let path = self.path.join(file);
        let text = fs::read_to_string(&path).context(|| format!("read {}", path.display()))?;
        Ok(text.trim_end().to_owned())
    }

    /// Writes an interface file.
    pub(crate) fn write(&self, file: &str, value: &str) -> Result<()> {
        write_file(&self.path.join(file), value)
    }

    /// Pids of all processes in this group and below, in the agent's pid namespace.
    pub(crate) fn pids(&self) -> Result<Vec<u32>> {
        let mut pids = Vec::new();
        for group in self.tree()? {
            match fs::read_to_string(group.join("cgroup.procs")) {
                Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok())),
                // The group has gone since the listing, or is threaded: the domain group lists its
                // processes.
                Err(e) if gone(&e) || e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
                Err(e) => return Err(e).context(|| format!("read {}", group.display())),
            }
        }
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Number of processes in the group that the kernel has killed because of the memory limit.
    pub(crate) fn oom_kills(&self) -> u64 {
        let text = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        field(&text, "oom_kill").unwrap_or(0)
    }

    /// Watches the count of [`Self::oom_kills`] for changes. A kernel without memory accounting is
    /// an error.
    pub(crate) fn watch_memory_events(&self) -> Result<Watch> {
        let path = self.path.join("memory.events");
        let context = || format!("watch {}", path.display());
        let file = fs::File::open(&path).context(context)?;
        // SAFETY: the returned value owns the file and never gives it out. So the descriptor stays
        // open, and refers to the same file, for as long as it is registered.
        let registered = unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) };
        let file = registered.map_err(io::Error::from).context(context)?;
        Ok(Watch(file))
    }

    /// Kills every process with SIGKILL, including processes in the middle of a fork.
    pub(crate) fn kill(&self) -> Result<()> {
        self.write("cgroup.kill", "1")
    }

    /// Freezes all processes until [`Self::resume`]. SIGKILL still ends them.
    ///
    /// If a process does not stop in time, all of them run on and the call fails. A second pause
    /// fails too.
    pub(crate) fn pause(&self) -> Result<()> {
        let mut paused = self.paused();
        if *paused {
            return Err(Error::state("the container is paused already"));
        }
        self.write("cgroup.freeze", "1")?;
        let frozen = wait_for_event(&self.path, "frozen", 1, FREEZE_TIMEOUT);
        if let Ok(true) = frozen {
            *paused = true;
            return Ok(());
        }
        self.write("cgroup.freeze", "0")?;
        frozen?;
        let limit = seconds(FREEZE_TIMEOUT);
        Err(Error::internal(format!(
            "a process does not stop within {limit}: it is in a call that cannot be interrupted"
        )))
    }

    /// Thaws all processes. A group that is not paused is an error.
    pub(crate) fn resume(&self) -> Result<()> {
        let mut paused = self.paused();
        if !*paused {
            return Err(Error::state("the container is not paused"));
        }
        self.write("cgroup.freeze", "0")?;
        *paused = false;
        Ok(())
    }

    fn paused(&self) -> MutexGuard<'_, bool> {
        self.paused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `action` while the group is frozen, so that no process can fork away from it.
    pub(crate) fn while_frozen<T>(&self, action: impl FnOnce() -> Result<T>) -> Result<T> {
        let paused = self.paused();
        if *paused {
            return action();
        }
        self.write("cgroup.freeze", "1")?;
        // Processes in uninterruptible sleep delay the event, but cannot fork meanwhile either.
        let frozen = wait_for_event(&self.path, "frozen", 1, Duration::from_secs(1));
        let result = frozen.and_then(|_| action());
        self.write("cgroup.freeze", "0")?;
        result
    }

    /// Removes the group with all below it, after killing all processes there. Processes that live
    /// on for [`KILL_TIMEOUT`] are an error.
    pub(crate) fn remove(&self) -> Result<()> {
        match self.kill() {
            Err(_) if !self.path.exists() => return Ok(()),
            result => result?,
        }
        if !wait_for_event(&self.path, "populated", 0, KILL_TIMEOUT)? {
            let (path, limit) = (self.path.display(), seconds(KILL_TIMEOUT));
            return Err(Error::internal(format!(
                "killed processes of {path} have not ended after {limit}"
            )));
        }
        for group in self.tree()?.iter().rev() {
            match fs::remove_dir(group) {
                Err(e) if !gone(&e) => {
                    return Err(e).context(|| format!("remove the cgroup {}", group.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// This group and all groups below it, parents first.
    fn tree(&self) -> Result<Vec<PathBuf>> {
        let mut groups = vec![self.path.clone()];
        let mut at = 0;
        while at < groups.len() {
            let depth = groups[at].components().count() - self.path.components().count();
            if depth < MAX_DEPTH {
                match fs::read_dir(&groups[at]) {
                    Ok(entries) => groups.extend(
                        entries
                            .flatten()
                            .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
                            .map(|e| e.path()),
                    ),
                    Err(e) if gone(&e) => {}
                    Err(e) => return Err(e).context(|| format!("list {}", groups[at].display())),
                }
            } else {
                log_warn!("cgroups below {} are too deep and are ignored", groups[at].display());
            }
            at += 1;
        }
        Ok(groups)
    }
}

/// An interface file with change notification.
pub(crate) struct Watch(AsyncFd<fs::File>);

impl Watch {
    /// Waits for the next change since the last call has returned, or since the watch was made. A
    /// read after the return sees at least this change.
    pub(crate) async fn changed(&mut self) -> Result<()> {
        let context = || "watch a cgroup";
        let mut ready = self.0.ready(Interest::PRIORITY).await.context(context)?;
        ready.clear_ready();
        // The kernel signals the next change only to a file whose reader has read this change.
        let mut file = ready.get_inner();
        io::Seek::rewind(&mut file).context(context)?;
        io::copy(&mut file, &mut io::sink()).context(context)?;
        Ok(())
    }
}

/// Waits until a field of `cgroup.events` has a value. Returns false after the timeout.
fn wait_for_event(group: &Path, name: &str, value: u64, timeout: Duration) -> Result<bool> {
    let path = group.join("cgroup.events");
    let context = || format!("read {}", path.display());
    let deadline = Instant::now() + timeout;
    let mut file = fs::File::open(&path).context(context)?;
    loop {
        let mut text = String::new();
        io::Seek::rewind(&mut file).context(context)?;
        file.read_to_string(&mut text).context(context)?;
        if field(&text, name) == Some(value) {
            return Ok(true);
        }
        let Some(left) = deadline.checked_duration_since(Instant::now()) else {
            return Ok(false);
        };
        let left = Timespec::try_from(left)
            .map_err(|_| Error::internal("the timeout of a cgroup event is out of range"))?;
        // The kernel signals a change of the file as an exceptional condition.
        match poll(&mut [PollFd::from_borrowed_fd(file.as_fd(), PollFlags::PRI)], Some(&left)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e).context(context),
        }
    }
}

/// Kills every process of every container and waits until all have ended.
pub(crate) fn kill_all_containers() {
    let containers = Path::new(CONTAINERS);
    let killed = write_file(&containers.join("cgroup.kill"), "1")
        .and_then(|()| wait_for_event(containers, "populated", 0, KILL_TIMEOUT));
    match killed {
        Ok(true) => {}
        Ok(false) => log_warn!("some processes of containers have not ended"),
        Err(e) => log_warn!("{e}"),
    }
}

fn gone(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

/// A number in a file of `name value` lines.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::field;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "oom 1\noom_kill 3\noom_group_kill 9\n";
        assert_eq!(field(text, "oom_kill"), Some(3));
        assert_eq!(field(text, "oom"), Some(1));
        assert_eq!(field(text, "max"), None);
    }
}

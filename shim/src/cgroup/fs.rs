//! Cgroups as directories.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, ErrorKind, Read, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FlockOperation, XattrFlags},
};
use serde::{Deserialize, Serialize};

use crate::{
    cgroup::systemd::{self, Unit},
    error::{Error, Explain, Result},
};

/// Mount point of the cgroup file system.
pub(super) const MOUNT_POINT: &str = "/sys/fs/cgroup";

/// Time in which killed processes have to leave a cgroup.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// Extended attribute of each directory that Isopod has made. Another sandbox that finds the
/// directory may be the last to use it, and then removes it.
const MADE_MARK: &str = "trusted.isopod.made";

/// Number of attempts to make a cgroup, if others remove its parents meanwhile.
const MAKE_ATTEMPTS: u32 = 8;

/// The cgroup of a sandbox, recorded before it is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// Directory of the cgroup.
    dir: PathBuf,
    /// Directories that have to be made for it, outermost first.
    made: Vec<PathBuf>,
    /// The systemd scope that it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    unit: Option<String>,
}

impl Cgroup {
    pub(super) fn plan(dir: &Path, unit: Option<&Unit>) -> Self {
        let mut made: Vec<PathBuf> =
            dir.ancestors().take_while(|dir| !dir.exists()).map(Path::to_owned).collect();
        made.reverse();
        Self { dir: dir.to_owned(), made, unit: unit.map(|unit| unit.name().to_owned()) }
    }

    /// Directory of the cgroup.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The systemd scope that the cgroup belongs to.
    pub(super) fn unit(&self) -> Option<&str> {
        self.unit.as_deref()
    }

    /// Makes the cgroup, with all controllers that there are, and moves this process into it. A
    /// cgroup of somebody else is an error.
    pub(crate) fn enter(&self) -> Result<()> {
        self.make_with(join)
    }

    /// Like [`Self::enter`], for processes that are started later.
    pub(crate) fn make(&self) -> Result<()> {
        self.make_with(|_| Ok(()))
    }

    fn make_with(&self, join: fn(&Path) -> io::Result<()>) -> Result<()> {
        let mut made = Vec::new();
        self.make_and_join(&mut made, join).inspect_err(|_| {
            if made.contains(&self.dir) {
                let _ = fs::remove_dir(&self.dir);
            }
            self.remove_parents();
        })
    }

    fn make_and_join(
        &self,
        made: &mut Vec<PathBuf>,
        join: fn(&Path) -> io::Result<()>,
    ) -> Result<()> {
        let what = || format!("cannot make the cgroup {}", self.dir.display());
        let mut tried = make(&self.dir, made);
        for _ in 1..MAKE_ATTEMPTS {
            if !tried.as_ref().is_err_and(|e| e.kind() == ErrorKind::NotFound) {
                break;
            }
            tried = make(&self.dir, made);
        }
        tried.explain(what)?;
        if self.unit.is_some() {
            // systemd has made it, and has put a process there.
            return Ok(());
        }
        let what = || format!("cannot enter the cgroup {}", self.dir.display());
        // Several sandboxes may find the cgroup empty, and its maker may be the last of them to
        // come here.
        let dir = File::open(&self.dir).explain(what)?;
        rustix::fs::flock(&dir, FlockOperation::LockExclusive).explain(what)?;
        if !made.contains(&self.dir) && self.made.contains(&self.dir) {
            return Err(Error::new(format!(
                "the cgroup {} has just been made by somebody else: name another one in \
                 linux.cgroupsPath",
                self.dir.display()
            )));
        }
        self.check_unused()?;
        join(&self.dir).explain(what)
    }

    /// Checks that the cgroup has no processes and is not frozen. A cgroup that was there before
    /// may be used, but not shared.
    fn check_unused(&self) -> Result<()> {
        let what = || format!("cannot look at the cgroup {}", self.dir.display());
        let processes = fs::read_to_string(self.dir.join("cgroup.procs")).explain(what)?;
        if let Some(first) = processes.lines().next() {
            return Err(Error::new(format!(
                "the cgroup {} is in use by process {first}: name another one in \
                 linux.cgroupsPath",
                self.dir.display()
            )));
        }
        let frozen = fs::read_to_string(self.dir.join("cgroup.freeze")).unwrap_or_default();
        if frozen.trim_end() == "1" {
            let dir = self.dir.display();
            return Err(Error::new(format!("the cgroup {dir} is frozen: thaw it first")));
        }
        Ok(())
    }

    /// Removes the cgroup and the directories made for it. Its processes have ended, or are about
    /// to end. A cgroup that is gone already is not an error.
    pub(crate) fn remove(&self) -> Result<()> {
        if let Some(unit) = &self.unit {
            systemd::stop(unit);
        }
        remove_tree(&self.dir)?;
        self.remove_parents();
        Ok(())
    }

    /// Removes parents of the cgroup that a sandbox has made and nobody uses any more.
    fn remove_parents(&self) {
        for parent in self.dir.ancestors().skip(1) {
            if !self.made.iter().any(|dir| dir == parent) && !is_marked(parent) {
                break;
            }
            match fs::remove_dir(parent) {
                // On NotFound another sandbox has removed it, and the directories above may be
                // left.
                Err(e) if e.kind() != ErrorKind::NotFound => break,
                _ => {}
            }
        }
    }
}

/// Moves this process to the cgroup `home`, or to the root cgroup if `home` does not take it.
pub(super) fn leave_for(home: &Path) {
    if let Err(error) = join(home) {
        log::debug!("cannot go back to the cgroup {}: {error}", home.display());
        // The root cgroup always takes processes.
        if let Err(error) = join(Path::new(MOUNT_POINT)) {
            log::warn!("cannot leave the container's cgroup: {error}");
        }
    }
}

/// Directory of this process's cgroup, on a host with cgroups v2 alone.
pub(crate) fn own_path() -> Option<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = text.strip_prefix("0::/")?.lines().next()?;
    let dir = Path::new(MOUNT_POINT);
    // A container may have no cgroup file system.
    dir.join("cgroup.procs")
        .exists()
        .then(|| if own.is_empty() { dir.into() } else { dir.join(own) })
}

/// Makes a cgroup and its parents, and adds those that were not there to `made`.
fn make(dir: &Path, made: &mut Vec<PathBuf>) -> io::Result<()> {
    let below = dir.strip_prefix(MOUNT_POINT).map_err(io::Error::other)?;
    let mut at = PathBuf::from(MOUNT_POINT);
    for name in below {
        enable_controllers(&at);
        at.push(name);
        match DirBuilder::new().mode(0o755).create(&at) {
            Ok(()) => {
                mark(&at);
                if !made.contains(&at) {
                    made.push(at.clone());
                }
            }
            Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

fn mark(dir: &Path) {
    if let Err(error) = rustix::fs::setxattr(dir, MADE_MARK, b"1", XattrFlags::empty()) {
        log::debug!("cannot mark the cgroup {} as made here: {error}", dir.display());
    }
}

fn is_marked(dir: &Path) -> bool {
    rustix::fs::getxattr(dir, MADE_MARK, &mut [0_u8; 1]).is_ok()
}

/// Enables controllers for the cgroups below `dir`. A controller that cannot be enabled has no
/// files below, as with runc.
fn enable_controllers(dir: &Path) {
    let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
    let enabled = read("cgroup.subtree_control");
    let missing: Vec<String> = read("cgroup.controllers")
        .split_whitespace()
        .filter(|name| !enabled.split_whitespace().any(|enabled| enabled == *name))
        .map(|name| format!("+{name}"))
        .collect();
    let file = dir.join("cgroup.subtree_control");
    if missing.is_empty() || write(&file, &missing.join(" ")).is_ok() {
        return;
    }
    for one in &missing {
        if let Err(error) = write(&file, one) {
            log::debug!("cannot write {one} to {}: {error}", file.display());
        }
    }
}

fn join(dir: &Path) -> io::Result<()> {
    write(&dir.join("cgroup.procs"), "0")
}

pub(super) fn write(path: &Path, text: &str) -> io::Result<()> {
    File::options().write(true).open(path)?.write_all(text.as_bytes())
}

/// Removes a cgroup and the cgroups below it.
fn remove_tree(dir: &Path) -> Result<()> {
    let what = || format!("cannot remove the cgroup {}", dir.display());
    match fs::remove_dir(dir) {
        Err(e) if e.kind() == ErrorKind::ResourceBusy => {}
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(e).explain(what),
        _ => return Ok(()),
    }
    for entry in fs::read_dir(dir).explain(what)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    if !wait_until_empty(dir).explain(what)? {
        let processes = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        return Err(Error::new(format!(
            "{}: these processes are still in it: {}",
            what(),
            processes.split_whitespace().collect::<Vec<_>>().join(", ")
        )));
    }
    match fs::remove_dir(dir) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e).explain(what),
        _ => Ok(()),
    }
}

/// Waits until a cgroup and the cgroups below it have no process. False if a process stays.
fn wait_until_empty(dir: &Path) -> io::Result<bool> {
    let deadline = Instant::now() + END_TIMEOUT;
    let mut events = File::open(dir.join("cgroup.events"))?;
    loop {
        let mut text = String::new();
        rustix::fs::seek(&events, rustix::fs::SeekFrom::Start(0))?;
        events.read_to_string(&mut text)?;
        if !text.lines().any(|line| line == "populated 1") {
            return Ok(true);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        // The file signals its changes since the last read (cgroup-v2.rst, "populated").
        match poll(
            &mut [PollFd::new(&events, PollFlags::PRI)],
            Timespec::try_from(left).ok().as_ref(),
        ) {
            Ok(0) => return Ok(false),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

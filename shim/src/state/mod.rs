//! The state of sandboxes on disk: one directory for each container below the root directory. It is
//! enough for any later `state`, `list` or `delete`.
//!
//! `<root>/<id>/` has mode 0700. It holds:
//!
//! - `state.json`, the record of the container
//! - `process.json`, the process of config.json, for `exec`
//! - `control.sock` and `vsock.sock`, if the container is the first of its sandbox
//! - `shared/`, the mount point of the share, empty on the host
//! - `console.log`, the guest's console, with `--debug`
//!
//! The owner of the directory holds a lock on it. The owner is the creator at first, then the
//! sandbox process while it lives, then the process that deletes the container.

mod status;
pub mod versions;

use std::{
    ffi::OsStr,
    fs::{self, DirBuilder, File},
    io::{ErrorKind, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::{DirBuilderExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};

pub use self::status::{Exit, Status};
use crate::{
    container_id::ContainerId,
    error::{Error, Explain, Result},
    random::random_u64,
};

/// Default of `--root`.
pub const DEFAULT_ROOT: &str = "/run/isopod/default";

/// State directories of the containers of all containerds, below a directory for each namespace.
pub const CONTAINERD_ROOT: &str = "/run/isopod/containerd";

/// The control socket of the sandbox process.
pub const CONTROL_SOCKET: &str = "control.sock";

/// The VMM's socket for connections to the guest.
pub const VSOCK_SOCKET: &str = "vsock.sock";

/// Mount point of the share.
pub const SHARED: &str = "shared";

/// The guest kernel's console, written with `--debug`.
pub const CONSOLE_LOG: &str = "console.log";

/// The process of config.json, for `exec`.
pub const PROCESS_FILE: &str = "process.json";

/// Number of attempts to make the root directory, if others remove it meanwhile.
const MAKE_ATTEMPTS: u32 = 8;

/// The record of the container, for any later `state`, `list` or `delete`.
pub const RECORD_FILE: &str = "state.json";

/// The state directory of one container, open.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    fd: OwnedFd,
    /// Parents that had to be made for it, outermost first.
    made: Vec<PathBuf>,
}

impl StateDir {
    /// Makes the directory of a new container and locks it. Of two callers with one id, one wins.
    pub fn create(root: &Path, id: &ContainerId) -> Result<Self> {
        let path = root.join(id.as_str());
        let mut made = Vec::new();
        let mut built = make(root, &path, &mut made);
        for _ in 1..MAKE_ATTEMPTS {
            // On NotFound the end of another container has removed the empty root directory.
            if !built.as_ref().is_err_and(|e| e.kind() == ErrorKind::NotFound) {
                break;
            }
            built = make(root, &path, &mut made);
        }
        let lock = || {
            built.map_err(|e| match e.kind() {
                ErrorKind::AlreadyExists => Error::new(format!(
                    "container {id} exists already: delete it first, or choose another id"
                )),
                ErrorKind::PermissionDenied => Error::new(format!(
                    "cannot make {}: permission denied (run isopod as root, or choose another \
                     directory with --root)",
                    path.display()
                )),
                _ => Error::because(format!("cannot make {}", path.display()), e),
            })?;
            let locked = Self::open_path(&path).and_then(|dir| Ok((dir.try_lock()?, dir)));
            match locked {
                Ok((true, dir)) if dir.is_linked() => Ok(Self { made: made.clone(), ..dir }),
                // A `delete --force` after the mkdir removes the directory again.
                Ok(_) => {
                    Err(Error::new(format!("container {id} was deleted while it was created")))
                }
                Err(error) => {
                    let _ = fs::remove_dir(&path);
                    Err(error)
                }
            }
        };
        lock().inspect_err(|_| remove_made(&made))
    }

    /// Opens the directory of an existing container.
    pub fn open(root: &Path, id: &ContainerId) -> Result<Self> {
        let path = root.join(id.as_str());
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() => Self::open_path(&path),
            Ok(_) => Err(Error::new(format!("{} is not a directory", path.display()))),
            Err(e) if e.kind() == ErrorKind::NotFound => {
                let root = root.display();
                Err(Error::new(format!("container does not exist: there is no {id} in {root}")))
            }
            Err(e) => Err(e).explain(|| format!("cannot open {}", path.display())),
        }
    }

    /// Opens a state directory by its path.
    pub fn open_path(path: &Path) -> Result<Self> {
        Ok(Self { path: path.to_owned(), fd: open_dir(path)?, made: Vec::new() })
    }

    /// Opens the state directory that another process has made, with the parents `made` for it.
    /// This process is to remove all of them in the other's place.
    pub fn adopt(path: &Path, made: Vec<PathBuf>) -> Result<Self> {
        Ok(Self { made, ..Self::open_path(path)? })
    }

    /// The path of a state directory that another process has opened.
    pub fn path_of(lock: BorrowedFd<'_>) -> Result<PathBuf> {
        fs::read_link(proc_path(lock)).explain(|| "cannot find the state directory".into())
    }

    /// Path of the directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Parents that had to be made for the directory, outermost first.
    pub fn made(&self) -> &[PathBuf] {
        &self.made
    }

    /// A path to a file in the directory that fits into a socket's address, whatever the length of
    /// the directory's own path. It is good for this process, while this is open.
    pub fn short_path(&self, name: &str) -> PathBuf {
        proc_path(self.fd.as_fd()).join(name)
    }

    /// Locks the directory. False if somebody else holds the lock.
    pub fn try_lock(&self) -> Result<bool> {
        match rustix::fs::flock(&self.fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            Err(e) => Err(e).explain(|| format!("cannot lock {}", self.path.display())),
        }
    }

    /// Locks the directory, and waits for that as long as somebody else holds the lock.
    pub fn lock(&self) -> Result<()> {
        rustix::fs::flock(&self.fd, FlockOperation::LockExclusive)
            .explain(|| format!("cannot lock {}", self.path.display()))
    }

    /// Reads a file of the directory. `None` while there is no such file.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        match fs::read(self.short_path(name)) {
            Ok(content) => Ok(Some(content)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).explain(|| format!("cannot read {}", self.path.join(name).display())),
        }
    }

    /// The container's id, which is the directory's name.
    pub fn container_name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Writes a file of the directory, all or nothing.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<()> {
        write_whole(&self.short_path(name), content)
            .explain(|| format!("cannot write {}", self.path.join(name).display()))
    }

    /// Removes one file of the directory, if it exists.
    pub fn remove_file(&self, name: &str) {
        let _ = rustix::fs::unlinkat(&self.fd, name, AtFlags::empty());
    }

    /// Tells whether the directory is still at its path. If not, it has been removed. Then the path
    /// may have the directory of another container with the same id.
    fn is_linked(&self) -> bool {
        match (rustix::fs::fstat(&self.fd), rustix::fs::lstat(&self.path)) {
            (Ok(ours), Ok(there)) => {
                ours.st_nlink > 0 && (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)
            }
            _ => false,
        }
    }

    /// Removes the directory and its content. Below it only empty directories are removed, so that
    /// nothing that might still be mounted is ever descended into. False if somebody else has
    /// removed it already.
    ///
    /// The caller has to hold the lock. The lock keeps the path from becoming another container's
    /// before the removal ends.
    pub fn remove(&self) -> Result<bool> {
        let linked = self.is_linked();
        if linked {
            match self.remove_entries().and_then(|()| fs::remove_dir(&self.path)) {
                Err(e) if e.kind() != ErrorKind::NotFound => {
                    return Err(e).explain(|| format!("cannot remove {}", self.path.display()));
                }
                _ => {}
            }
        }
        remove_made(&self.made);
        Ok(linked)
    }

    fn remove_entries(&self) -> std::io::Result<()> {
        // By the descriptor: the path may change, and the open directory does not.
        for entry in fs::read_dir(proc_path(self.fd.as_fd()))? {
            let entry = entry?;
            let removed = if entry.file_type()?.is_dir() {
                fs::remove_dir(entry.path())
            } else {
                fs::remove_file(entry.path())
            };
            match removed {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }
}

impl AsFd for StateDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The ids of all containers below a root directory, sorted. Empty if there is no such directory.
pub fn ids(root: &Path) -> Result<Vec<ContainerId>> {
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).explain(|| format!("cannot read {}", root.display())),
    };
    let mut ids: Vec<ContainerId> = entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| ContainerId::parse(entry.file_name().to_str()?).ok())
        .collect();
    ids.sort();
    Ok(ids)
}

/// Writes a file through a temporary file beside it, so that nobody sees half of it. The temporary
/// file is new: in a directory of somebody else, a link with its name leads nowhere. After an error
/// it is removed.
pub fn write_whole(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let (mut file, temporary) = make_temporary(path)?;
    let mut write = || {
        file.write_all(content)?;
        fs::rename(&temporary, path)
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

/// Makes a file beside `path` with a name that nobody can foresee.
fn make_temporary(path: &Path) -> std::io::Result<(File, PathBuf)> {
    loop {
        let mut name = OsStr::new(".").to_owned();
        name.push(path.file_name().unwrap_or_default());
        name.push(format!(".{:016x}", random_u64().map_err(std::io::Error::other)?));
        let temporary = path.with_file_name(name);
        match File::options().write(true).create_new(true).mode(0o644).open(&temporary) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            made => return Ok((made?, temporary)),
        }
    }
}

fn open_dir(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .explain(|| format!("cannot open {}", path.display()))
}

fn proc_path(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Makes a container's directory, and before it the root directory and its parents. Adds those that
/// were missing to `made`.
fn make(root: &Path, path: &Path, made: &mut Vec<PathBuf>) -> std::io::Result<()> {
    let missing = root.ancestors().take_while(|dir| !dir.exists());
    made.extend(missing.filter(|dir| !dir.as_os_str().is_empty()).map(Path::to_owned));
    // Parents first.
    made.sort();
    made.dedup();
    DirBuilder::new().recursive(true).mode(0o711).create(root)?;
    DirBuilder::new().mode(0o700).create(path)
}

/// Removes directories that were made, as far as they are empty.
fn remove_made(made: &[PathBuf]) {
    for dir in made.iter().rev() {
        let _ = fs::remove_dir(dir);
    }
}

#[cfg(test)]
mod tests;

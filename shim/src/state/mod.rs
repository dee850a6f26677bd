//! What a sandbox leaves on disk: one directory for each container below the root directory,
//! enough for any later `state`, `list` or `delete`.
//!
//! `<root>/<id>/` (mode 0700) holds `state.json` (see [`Record`]), `process.json` (the container's
//! process, which `exec` starts from), `control.sock`, `vsock.sock`, `shared/` (the mount point of
//! the shared directory, empty on the host) and, with `--debug`, `console.log`. The process that
//! owns it holds a lock on the directory: the creator at first, then the sandbox process for as
//! long as it lives, then whoever deletes it.

mod id;
mod process;
mod record;

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

use self::record::Versions;
pub use self::{
    id::Id,
    process::ProcessId,
    record::{Exit, Protocols, Record, Remains, STATE_VERSION, Status},
};
use crate::{
    error::{Error, Explain, Result},
    sandbox::random_u64,
};

/// Where `--root` points by default.
pub const DEFAULT_ROOT: &str = "/run/isopod/default";

/// The sandbox process's socket for [`crate::sandbox::control`].
pub const CONTROL_SOCKET: &str = "control.sock";

/// The VMM's socket for connections to the guest.
pub const VSOCK_SOCKET: &str = "vsock.sock";

/// Mount point of the directory that the guest shares.
pub const SHARED: &str = "shared";

/// The guest kernel's console, written with `--debug`.
pub const CONSOLE_LOG: &str = "console.log";

/// The process of config.json, for `exec`.
pub const PROCESS_FILE: &str = "process.json";

/// How often to make the root directory anew when it is taken away before it is used.
const MAKE_ATTEMPTS: u32 = 8;

const RECORD_FILE: &str = "state.json";

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
    ///
    /// # Errors
    ///
    /// If the id is in use, or the directory cannot be made.
    pub fn create(root: &Path, id: &Id) -> Result<Self> {
        let path = root.join(id.as_str());
        let mut made = Vec::new();
        let mut built = make(root, &path, &mut made);
        for _ in 1..MAKE_ATTEMPTS {
            // The end of another container has taken the empty root directory away meanwhile.
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
                // A `delete --force` after mkdir takes the directory away again.
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
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn open(root: &Path, id: &Id) -> Result<Self> {
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
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn open_path(path: &Path) -> Result<Self> {
        Ok(Self { path: path.to_owned(), fd: open_dir(path)?, made: Vec::new() })
    }

    /// Opens the state directory that another process has made, and `made` for it, to remove all of
    /// that in its place.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn adopt(path: &Path, made: Vec<PathBuf>) -> Result<Self> {
        Ok(Self { made, ..Self::open_path(path)? })
    }

    /// The path of a state directory that somebody else has opened.
    ///
    /// # Errors
    ///
    /// If it cannot be found.
    pub fn path_of(lock: BorrowedFd<'_>) -> Result<PathBuf> {
        fs::read_link(proc_path(lock)).explain(|| "cannot find the state directory".into())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Parents that had to be made for it, outermost first.
    pub fn made(&self) -> &[PathBuf] {
        &self.made
    }

    /// A path to a file in it that is short enough for a socket's address, whatever the length of
    /// the directory's own path. Good for this process, while this is open.
    pub fn short_path(&self, name: &str) -> PathBuf {
        proc_path(self.fd.as_fd()).join(name)
    }

    /// Locks the directory, unless somebody else has.
    ///
    /// # Errors
    ///
    /// If locking fails for another reason.
    pub fn try_lock(&self) -> Result<bool> {
        match rustix::fs::flock(&self.fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            Err(e) => Err(e).explain(|| format!("cannot lock {}", self.path.display())),
        }
    }

    /// Reads the record, or `None` while there is none.
    ///
    /// # Errors
    ///
    /// If it cannot be read, is not valid, or another version of isopod has written it.
    pub fn record(&self) -> Result<Option<Record>> {
        let Some(json) = self.read_record()? else { return Ok(None) };
        let what = || self.path.join(RECORD_FILE).display().to_string();
        // First, since a record of another version may well have another form.
        let versions: Versions = serde_json::from_slice(&json).explain(what)?;
        versions.check_state(&self.name())?;
        serde_json::from_slice(&json).map(Some).explain(what)
    }

    /// Checks that the sandbox speaks as this program does. One that has no record yet was started by
    /// this program.
    ///
    /// # Errors
    ///
    /// If it does not, with what to do.
    pub fn check_protocols(&self) -> Result<()> {
        let Some(json) = self.read_record()? else { return Ok(()) };
        let versions: Versions = serde_json::from_slice(&json)
            .explain(|| self.path.join(RECORD_FILE).display().to_string())?;
        versions.check(&self.name())
    }

    /// What can be known of a container, however its record is written.
    pub fn remains(&self) -> Remains {
        self.read_record().ok().flatten().map(|json| Remains::of(&json)).unwrap_or_default()
    }

    fn read_record(&self) -> Result<Option<Vec<u8>>> {
        match fs::read(self.short_path(RECORD_FILE)) {
            Ok(json) => Ok(Some(json)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => {
                Err(e).explain(|| format!("cannot read {}", self.path.join(RECORD_FILE).display()))
            }
        }
    }

    /// The container's id.
    fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Writes the record; a reader sees the old one or the new one, whole.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn write_record(&self, record: &Record) -> Result<()> {
        let json = serde_json::to_vec(record).explain(|| "cannot write the state".into())?;
        self.write(RECORD_FILE, &json)
    }

    /// Writes a file of the directory, all or nothing.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<()> {
        write_whole(&self.short_path(name), content)
            .explain(|| format!("cannot write {}", self.path.join(name).display()))
    }

    /// Removes one file of the directory, if it exists.
    pub fn remove_file(&self, name: &str) {
        let _ = rustix::fs::unlinkat(&self.fd, name, AtFlags::empty());
    }

    /// The directory is still at its path. If not, it has been removed, and what is at the path may
    /// be another container's of the same name.
    fn is_linked(&self) -> bool {
        match (rustix::fs::fstat(&self.fd), rustix::fs::lstat(&self.path)) {
            (Ok(ours), Ok(there)) => {
                ours.st_nlink > 0 && (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)
            }
            _ => false,
        }
    }

    /// Removes the directory and what is in it. Only empty directories are removed below it, so
    /// that nothing that might still be mounted is ever descended into. For who has the lock, which
    /// keeps the path from becoming another container's between the check and the end.
    ///
    /// # Errors
    ///
    /// If something in it cannot be removed. That it is gone already is not an error: then the
    /// answer is false, and somebody else has removed it.
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
        // By the descriptor: what is at the path may change, what is open does not.
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

/// The ids of all containers below a root directory, sorted. None if there is no such directory.
///
/// # Errors
///
/// If the directory cannot be read.
pub fn ids(root: &Path) -> Result<Vec<Id>> {
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).explain(|| format!("cannot read {}", root.display())),
    };
    let mut ids: Vec<Id> = entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| Id::parse(entry.file_name().to_str()?).ok())
        .collect();
    ids.sort();
    Ok(ids)
}

/// Writes a file through a temporary one beside it, so that nobody sees half of it. The temporary one is
/// new: in a directory of somebody else, a link with its name leads nowhere.
///
/// # Errors
///
/// If it cannot be written; the temporary file is removed.
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

/// Makes a file beside `path` whose name nobody can foresee.
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

/// Makes a container's directory in the root directory, that and its parents first, and adds those
/// that were missing to `made`.
fn make(root: &Path, path: &Path, made: &mut Vec<PathBuf>) -> std::io::Result<()> {
    let missing = root.ancestors().take_while(|dir| !dir.exists());
    made.extend(missing.filter(|dir| !dir.as_os_str().is_empty()).map(Path::to_owned));
    // Parents first.
    made.sort();
    made.dedup();
    DirBuilder::new().recursive(true).mode(0o711).create(root)?;
    DirBuilder::new().mode(0o700).create(path)
}

/// Removes directories that were made on the way, as far as they are empty.
fn remove_made(made: &[PathBuf]) {
    for dir in made.iter().rev() {
        let _ = fs::remove_dir(dir);
    }
}

#[cfg(test)]
mod tests;

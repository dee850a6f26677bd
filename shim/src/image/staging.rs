//! A directory beside the place of a bundle. It takes that place when the bundle is complete.

use std::{
    ffi::{CString, OsStr},
    fs,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

use rustix::{
    fd::OwnedFd,
    fs::{CWD, FlockOperation, Mode, OFlags, fchmod, flock, fstat, mkdirat, openat, renameat},
    io::Errno,
};

use crate::{
    error::{Error, Explain, Result},
    image::remove::{DIRECTORY, remove_tree},
};

/// Permissions of a bundle. Set-id programs and devices of an image are for no other user of this
/// machine.
const BUNDLE_MODE: Mode = Mode::RWXU;

/// A bundle in the making. Unless it is finished, its drop removes it.
#[derive(Debug)]
pub(super) struct Staging {
    parent: OwnedFd,
    /// The directory, locked so that nobody takes it for one that was left behind.
    dir: OwnedFd,
    path: PathBuf,
    name: CString,
    bundle: PathBuf,
    finished: bool,
}

impl Staging {
    /// Makes the directory for `bundle`. A directory that a killed process has left is removed
    /// first.
    ///
    /// Something at `bundle`, or another process that makes the same bundle, is an error.
    pub(super) fn new(bundle: &Path) -> Result<Self> {
        let bundle = place(bundle)?;
        let (Some(above), Some(name)) = (bundle.parent(), bundle.file_name()) else {
            return Err(Error::new(format!("{} cannot be a bundle", bundle.display())));
        };
        let parent =
            openat(CWD, above, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .explain(|| format!("cannot open {}", above.display()))?;
        let name = [b".", name.as_bytes(), b".unpacking"].concat();
        let path = above.join(OsStr::from_bytes(&name));
        let what = || format!("cannot make {}", path.display());
        let name = CString::new(name).map_err(|e| Error::new(e.to_string()))?;
        match mkdirat(&parent, &*name, BUNDLE_MODE) {
            Err(Errno::EXIST) => {
                clear(&parent, &name, &path)?;
                mkdirat(&parent, &*name, BUNDLE_MODE).explain(what)?;
            }
            made => made.explain(what)?,
        }
        let dir = openat(&parent, &*name, DIRECTORY, Mode::empty()).explain(what)?;
        flock(&dir, FlockOperation::NonBlockingLockExclusive).explain(what)?;
        let staging = Self { parent, dir, path, name, bundle, finished: false };
        fchmod(&staging.dir, BUNDLE_MODE).explain(|| staging.path.display().to_string())?;
        Ok(staging)
    }

    /// The open directory.
    pub(super) fn dir(&self) -> &OwnedFd {
        &self.dir
    }

    /// Path of the directory.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Renames the directory to the bundle. Something at its place by now is an error.
    pub(super) fn finish(mut self) -> Result<()> {
        renameat(&self.parent, &*self.name, CWD, &self.bundle)
            .explain(|| format!("cannot make the bundle {}", self.bundle.display()))?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        if let Err(error) = remove_tree(&self.parent, &self.name) {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// The absolute path of a bundle that can be made.
fn place(bundle: &Path) -> Result<PathBuf> {
    let what = || format!("the bundle {}", bundle.display());
    let mut entries = match fs::read_dir(bundle) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let path = std::path::absolute(bundle).explain(what)?;
            // The rename would replace a symbolic link to nothing.
            if path.is_symlink() {
                return Err(Error::new(format!("{} is a symbolic link to nothing", what())));
            }
            return Ok(path);
        }
        Err(e) => return Err(e).explain(what),
    };
    if let Some(entry) = entries.next() {
        let name = entry.explain(what)?.file_name();
        return Err(Error::new(format!(
            "{} exists and is not empty: it has {name:?} in it; name a new directory",
            what()
        )));
    }
    place_of_empty(bundle)
}

/// [`place`] of an empty directory, which the bundle will replace.
pub(super) fn place_of_empty(bundle: &Path) -> Result<PathBuf> {
    let what = || format!("the bundle {}", bundle.display());
    let path = fs::canonicalize(bundle).explain(what)?;
    // A caller that is there would be left in a directory without a name.
    if std::env::current_dir().is_ok_and(|here| here == path) {
        return Err(Error::new(format!(
            "{} is the working directory; name a new directory in it",
            what()
        )));
    }
    let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev()).explain(what);
    match path.parent() {
        Some(parent) if device(parent)? == device(&path)? => Ok(path),
        _ => Err(Error::new(format!(
            "{} is a mount point, which cannot be replaced; name a new directory in it",
            what()
        ))),
    }
}

/// Removes the directory that a killed process has left.
fn clear(parent: &OwnedFd, name: &CString, path: &Path) -> Result<()> {
    let what = || format!("{} is in the way", path.display());
    let old = openat(parent, &**name, DIRECTORY, Mode::empty()).explain(what)?;
    let stat = fstat(&old).explain(what)?;
    // Another owner could move the directory about while it is removed.
    let ours = stat.st_uid == rustix::process::geteuid().as_raw()
        && Mode::from_raw_mode(stat.st_mode) == BUNDLE_MODE;
    if !ours {
        return Err(Error::new(format!("{}: it is not left from unpacking; remove it", what())));
    }
    match flock(&old, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => {
            return Err(Error::new(format!(
                "{}: the same bundle is being made by another process",
                what()
            )));
        }
        locked => locked.explain(what)?,
    }
    remove_tree(parent, name).explain(what)
}

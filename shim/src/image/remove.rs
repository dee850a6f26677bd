//! Removes a tree that somebody else has shaped, and never anything outside the tree. However deep
//! the tree is, this takes two descriptors, and constant memory except for names.

use std::ffi::{CStr, CString};

use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{AtFlags, Dir, Mode, OFlags, fstat, openat, unlinkat},
    io::{Errno, Result},
};

/// Flags to open a directory for its names, and never through a symbolic link.
pub(super) const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Removes `name` from `parent`, with everything in it. A missing name is no error.
pub(super) fn remove_tree(parent: impl AsFd, name: &CStr) -> Result<()> {
    let parent = parent.as_fd();
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(error) => return Err(error),
    }
    let mut current = openat(parent, name, DIRECTORY, Mode::empty())?;
    // The way down: each directory's inode number, and its name in the directory above.
    let mut way = vec![(inode(&current)?, name.to_owned())];
    loop {
        match remove_files(&current)? {
            Some(child) => {
                current = openat(&current, &*child, DIRECTORY, Mode::empty())?;
                way.push((inode(&current)?, child));
            }
            None => {
                let Some((_, name)) = way.pop() else { return Ok(()) };
                let Some((inode, _)) = way.last() else {
                    return unlinkat(parent, &*name, AtFlags::REMOVEDIR);
                };
                current = up(&current, *inode)?;
                unlinkat(&current, &*name, AtFlags::REMOVEDIR)?;
            }
        }
    }
}

/// Removes files from `dir`, up to the first directory in it. Returns that directory's name.
fn remove_files(dir: &OwnedFd) -> Result<Option<CString>> {
    loop {
        let mut removed = false;
        for name in names(dir)? {
            let name = name?;
            match unlinkat(dir, &*name, AtFlags::empty()) {
                Ok(()) => removed = true,
                Err(Errno::ISDIR) => return Ok(Some(name)),
                Err(error) => return Err(error),
            }
        }
        // A file system may skip names if others are removed while it lists them.
        if !removed {
            return Ok(None);
        }
    }
}

/// The names in `dir`, without `.` and `..`.
pub(super) fn names(dir: &OwnedFd) -> Result<impl Iterator<Item = Result<CString>>> {
    let entries = Dir::read_from(dir)?;
    Ok(entries.filter_map(|entry| match entry {
        Ok(entry) if matches!(entry.file_name().to_bytes(), b"." | b"..") => None,
        Ok(entry) => Some(Ok(entry.file_name().to_owned())),
        Err(error) => Some(Err(error)),
    }))
}

/// Opens the directory above `dir`. It has to have the inode number `expected`.
pub(super) fn up(dir: &OwnedFd, expected: u64) -> Result<OwnedFd> {
    let above = openat(dir, c"..", DIRECTORY, Mode::empty())?;
    // Somebody has moved the directory meanwhile, so the directory above may be outside the tree.
    if inode(&above)? != expected { Err(Errno::STALE) } else { Ok(above) }
}

/// The inode number of a file, unique in its file system while the file exists.
pub(super) fn inode(file: &OwnedFd) -> Result<u64> {
    Ok(fstat(file)?.st_ino)
}

//! The root file system in the making, as a place that no path leads out of.
//!
//! Each part of a path is opened by itself, from the directory before it, and never through a
//! symbolic link. Links are read and followed here, with the tree's root as theirs. The kernel does
//! the same for a process with that root directory (`RESOLVE_IN_ROOT` of openat2(2)). So a path
//! means here what it will mean in the container. `openat2` itself would not tell the directories
//! that a path passes through, and whiteouts need these.

use std::{
    collections::HashSet,
    ffi::{CStr, CString},
    hash::{BuildHasher, RandomState},
};

use rustix::{
    fd::OwnedFd,
    fs::{
        AtFlags, Mode, OFlags, Stat, Timespec, Timestamps, fchmod, fstat, futimens, mkdirat,
        openat, readlinkat, statat,
    },
    io::Errno,
};

use crate::{
    error::{Error, Explain, Result},
    image::{
        name::Parts,
        remove::{DIRECTORY, inode, names, remove_tree, up},
    },
    text::quoted,
};

/// Largest number of symbolic links to follow in one path. This is Linux's limit.
const MAX_LINKS: u32 = 40;

/// Permissions of a directory that a layer has files for, but no entry.
const IMPLIED_MODE: Mode = Mode::from_raw_mode(0o755);

/// A root file system in the making.
#[derive(Debug)]
pub(super) struct Tree {
    root: OwnedFd,
    root_inode: u64,
    /// Hashes of directory and name, for the current layer's entries and the directories on the way
    /// there.
    upper: HashSet<u64>,
    hasher: RandomState,
}

/// A directory of the tree.
#[derive(Debug)]
pub(super) struct Directory {
    pub(super) fd: OwnedFd,
    inode: u64,
    /// The way here from the root.
    way: Vec<Step>,
}

/// A directory on the way: the inode number of the directory above, and the hash of its own place.
#[derive(Debug)]
struct Step {
    above: u64,
    hash: u64,
}

impl Tree {
    /// Makes and opens the directory `name`, empty and with usual permissions.
    pub(super) fn create(parent: &OwnedFd, name: &str) -> Result<Self> {
        let what = || format!("cannot make the directory {name}");
        mkdirat(parent, name, IMPLIED_MODE).explain(what)?;
        let root = openat(parent, name, DIRECTORY, Mode::empty()).explain(what)?;
        fchmod(&root, IMPLIED_MODE).explain(what)?;
        let root_inode = inode(&root).explain(what)?;
        Ok(Self { root, root_inode, upper: HashSet::new(), hasher: RandomState::new() })
    }

    /// Begins a layer. All files that are there belong to lower layers from now on.
    pub(super) fn begin_layer(&mut self) {
        self.upper = HashSet::new();
    }

    /// The root directory.
    pub(super) fn root(&self) -> Result<Directory> {
        let fd = self.root.try_clone().explain(|| "cannot open the root".into())?;
        Ok(Directory { fd, inode: self.root_inode, way: Vec::new() })
    }

    /// Follows a path to a directory. None if a part is missing, or is no directory.
    ///
    /// With `create`, a missing directory is made, and a part that is no directory is an error.
    pub(super) fn directory(&mut self, parts: &[&[u8]], create: bool) -> Result<Option<Directory>> {
        let mut here = self.root()?;
        let mut links = 0;
        let mut todo: Vec<CString> = Vec::new();
        push(&mut todo, parts.iter().copied())?;
        while let Some(part) = todo.pop() {
            let what = || format!("cannot open the directory {}", quoted(part.to_bytes()));
            if part.as_bytes() == b".." {
                here = self.above(here).explain(what)?;
                continue;
            }
            match openat(&here.fd, &*part, DIRECTORY, Mode::empty()) {
                Ok(fd) => here = self.below(here, fd, &part).explain(what)?,
                Err(Errno::NOENT) if create => {
                    let fd = make(&here.fd, &part).explain(what)?;
                    here = self.below(here, fd, &part).explain(what)?;
                }
                Err(Errno::NOENT) => return Ok(None),
                Err(error @ (Errno::LOOP | Errno::NOTDIR)) => {
                    let target = match readlinkat(&here.fd, &*part, Vec::new()) {
                        Ok(target) => target,
                        Err(Errno::INVAL) if create => return Err(error).explain(what),
                        Err(Errno::INVAL) => return Ok(None),
                        Err(error) => return Err(error).explain(what),
                    };
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Errno::LOOP).explain(what);
                    }
                    if target.as_bytes().starts_with(b"/") {
                        here = self.root()?;
                    }
                    push(&mut todo, target.as_bytes().split(|byte| *byte == b'/'))?;
                }
                Err(error) => return Err(error).explain(what),
            }
        }
        Ok(Some(here))
    }

    fn below(&self, here: Directory, fd: OwnedFd, name: &CStr) -> rustix::io::Result<Directory> {
        let mut way = here.way;
        way.push(Step { above: here.inode, hash: self.hash(here.inode, name) });
        Ok(Directory { inode: inode(&fd)?, fd, way })
    }

    /// The directory above `here`. Above the root there is the root.
    fn above(&self, mut here: Directory) -> rustix::io::Result<Directory> {
        let Some(step) = here.way.pop() else { return Ok(here) };
        Ok(Directory { fd: up(&here.fd, step.above)?, inode: step.above, way: here.way })
    }

    fn hash(&self, directory: u64, name: &CStr) -> u64 {
        self.hasher.hash_one((directory, name.to_bytes()))
    }

    /// Records that the current layer has `name` in `directory`.
    pub(super) fn keep(&mut self, directory: &Directory, name: &CStr) {
        self.keep_way(directory);
        self.upper.insert(self.hash(directory.inode, name));
    }

    /// Records that the current layer has entries in `directory` or below.
    pub(super) fn keep_way(&mut self, directory: &Directory) {
        self.upper.extend(directory.way.iter().map(|step| step.hash));
    }

    /// Removes files of lower layers: `name` in `directory`, or everything in `directory`. Files of
    /// the current layer stay, whether they come before or after. A whiteout hides only files below
    /// its own layer (image-spec layer.md, "Whiteouts").
    pub(super) fn hide(
        &self,
        directory: &Directory,
        name: Option<&CStr>,
    ) -> rustix::io::Result<()> {
        let times = times(&directory.fd)?;
        match name {
            Some(name) if !self.upper.contains(&self.hash(directory.inode, name)) => {
                remove_tree(&directory.fd, name)?;
            }
            Some(name) => match openat(&directory.fd, name, DIRECTORY, Mode::empty()) {
                Ok(fd) => self.hide_within(fd)?,
                Err(Errno::NOTDIR | Errno::LOOP | Errno::NOENT) => {}
                Err(error) => return Err(error),
            },
            None => self.hide_within(openat(&directory.fd, c".", DIRECTORY, Mode::empty())?)?,
        }
        futimens(&directory.fd, &times)
    }

    /// Removes files of lower layers below `top`. Like [`remove_tree`], this holds one directory
    /// open, not a chain of them.
    fn hide_within(&self, top: OwnedFd) -> rustix::io::Result<()> {
        let mut current = top;
        let mut way = vec![(inode(&current)?, self.hide_files(&current)?)];
        loop {
            let Some((_, kept)) = way.last_mut() else { return Ok(()) };
            if let Some(child) = kept.pop() {
                match openat(&current, &*child, DIRECTORY, Mode::empty()) {
                    Ok(fd) => current = fd,
                    Err(Errno::NOTDIR | Errno::LOOP) => continue,
                    Err(error) => return Err(error),
                }
                way.push((inode(&current)?, self.hide_files(&current)?));
                continue;
            }
            way.pop();
            let Some((above, _)) = way.last() else { return Ok(()) };
            current = up(&current, *above)?;
        }
    }

    /// Removes files of lower layers from one directory. Returns the names that stay.
    fn hide_files(&self, directory: &OwnedFd) -> rustix::io::Result<Vec<CString>> {
        let number = inode(directory)?;
        let times = times(directory)?;
        let mut kept = Vec::new();
        for name in names(directory)? {
            let name = name?;
            if self.upper.contains(&self.hash(number, &name)) {
                kept.push(name);
            } else {
                remove_tree(directory, &name)?;
            }
        }
        futimens(directory, &times)?;
        Ok(kept)
    }

    /// Opens a regular file by a path in the tree, or None if there is none.
    pub(super) fn open_file(&mut self, parts: &Parts<'_>) -> Result<Option<OwnedFd>> {
        let what = || format!("cannot open {}", quoted(&parts.join(&b'/')));
        // A link to the file is followed by putting its target in the place of the path's last
        // part.
        let mut parts: Vec<Vec<u8>> = parts.iter().map(|part| part.to_vec()).collect();
        for _ in 0..MAX_LINKS {
            let borrowed: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
            let Some((last, above)) = borrowed.split_last() else { return Ok(None) };
            let Some(directory) = self.directory(above, false)? else { return Ok(None) };
            let name = CString::new(*last).map_err(|e| Error::new(e.to_string()))?;
            match readlinkat(&directory.fd, &*name, Vec::new()) {
                Ok(target) => {
                    let above = if target.as_bytes().starts_with(b"/") { &[] } else { above };
                    let target = target.as_bytes().split(|byte| *byte == b'/');
                    let target = target.filter(|part| !part.is_empty() && *part != b".");
                    parts = above.iter().copied().chain(target).map(<[u8]>::to_vec).collect();
                }
                Err(Errno::NOENT) => return Ok(None),
                Err(Errno::INVAL) => {
                    let stat = statat(&directory.fd, &*name, AtFlags::SYMLINK_NOFOLLOW);
                    if !is_regular(&stat.explain(what)?) {
                        return Ok(None);
                    }
                    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    let file = openat(&directory.fd, &*name, flags, Mode::empty());
                    return file.map(Some).explain(what);
                }
                Err(error) => return Err(error).explain(what),
            }
        }
        Err(Errno::LOOP).explain(what)
    }
}

fn is_regular(stat: &Stat) -> bool {
    rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::RegularFile
}

/// Makes a directory that a layer implies.
fn make(parent: &OwnedFd, name: &CStr) -> rustix::io::Result<OwnedFd> {
    let times = times(parent)?;
    mkdirat(parent, name, IMPLIED_MODE)?;
    futimens(parent, &times)?;
    let fd = openat(parent, name, DIRECTORY, Mode::empty())?;
    fchmod(&fd, IMPLIED_MODE)?;
    Ok(fd)
}

/// Access and modification time of a directory, to be set again. A layer changes them only by an
/// entry.
pub(super) fn times(directory: &OwnedFd) -> rustix::io::Result<Timestamps> {
    let stat = fstat(directory)?;
    let time = |seconds, nanoseconds: u64| Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds.try_into().unwrap_or_default(),
    };
    Ok(Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    })
}

/// Pushes the parts of a path on the stack, the first one on top.
fn push<'a>(
    todo: &mut Vec<CString>,
    parts: impl DoubleEndedIterator<Item = &'a [u8]>,
) -> Result<()> {
    for part in parts.rev().filter(|part| !part.is_empty() && *part != b".") {
        todo.push(CString::new(part).map_err(|_| Error::new("a path has a NUL byte"))?);
    }
    Ok(())
}

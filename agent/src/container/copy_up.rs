//! `tmpcopyup`: the image's files at the mount point, copied into a new tmpfs.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Uid, chmodat, chownat, mkdirat, mknodat,
    openat, readlinkat, statat, symlinkat,
};
use rustix::io::Errno;

/// Deepest directory level that is copied.
const MAX_DEPTH: usize = 128;

const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Copies the contents of one directory into another, with owners and modes.
///
/// Mode and owner of the top directory are options of the new file system. A tree that is too deep
/// fails with `ELOOP`.
pub(crate) fn copy(from: &OwnedFd, to: &OwnedFd) -> Result<(), Errno> {
    let stat = rustix::fs::fstat(from)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Err(Errno::NOTDIR);
    }
    // `from` and `to` are O_PATH descriptors, which getdents(2) refuses.
    let from = openat(from, c".", DIRECTORY, Mode::empty())?;
    let to = openat(to, c".", DIRECTORY, Mode::empty())?;
    copy_entries(&from, &to, 0)
}

fn copy_entries(from: &OwnedFd, to: &OwnedFd, depth: usize) -> Result<(), Errno> {
    if depth > MAX_DEPTH {
        return Err(Errno::LOOP);
    }
    for entry in Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        copy_entry(from, to, name, &stat, depth)?;
        let owner = (Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)));
        chownat(to, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)?;
        // The mode follows the owner, because a change of owner clears set-id bits.
        if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
            chmodat(to, name, Mode::from_raw_mode(stat.st_mode), AtFlags::empty())?;
        }
    }
    Ok(())
}

fn copy_entry(
    from: &OwnedFd,
    to: &OwnedFd,
    name: &CStr,
    stat: &Stat,
    depth: usize,
) -> Result<(), Errno> {
    let mode = Mode::from_raw_mode(stat.st_mode);
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            mkdirat(to, name, Mode::RWXU)?;
            let from = openat(from, name, DIRECTORY, Mode::empty())?;
            let to = openat(to, name, DIRECTORY, Mode::empty())?;
            copy_entries(&from, &to, depth + 1)
        }
        FileType::Symlink => symlinkat(readlinkat(from, name, Vec::new())?, to, name),
        FileType::RegularFile => {
            let read = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let write = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let from = openat(from, name, read, Mode::empty())?;
            let to = openat(to, name, write, Mode::RUSR | Mode::WUSR)?;
            copy_bytes(&from, &to)
        }
        kind => mknodat(to, name, kind, mode, stat.st_rdev),
    }
}

fn copy_bytes(from: impl AsFd, to: impl AsFd) -> Result<(), Errno> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let n = rustix::io::read(&from, &mut buffer[..])?;
        if n == 0 {
            return Ok(());
        }
        let mut written = 0;
        while written < n {
            written += rustix::io::write(&to, &buffer[written..n])?;
        }
    }
}

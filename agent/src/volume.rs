//! Volumes of the host that the guest keeps copies of, so that inotify(7) reports their changes.
//!
//! A container may find ways to write to its copy. So no step follows a symbolic link in it.

use std::collections::HashSet;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use isopod_protocol::agent::VolumeFile;
use isopod_protocol::agent::volume_file::Content;
use rustix::fs::{
    AtFlags, Dir, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, chownat, fchmod,
    fchown, fstat, futimens, mkdirat, openat, openat2, readlinkat, renameat, symlinkat, unlinkat,
};
use rustix::io::{self, Errno};

use crate::container::path::open_in_guest;
use crate::error::{Context as _, Result};

/// Name of a file that is being written. No kubelet makes such a name.
const UNFINISHED: &str = "..isopod-new";

/// Most directories in one another.
const MAX_DEPTH: usize = 32;

const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Makes `files` the content of the directory `root`. What is the same already stays untouched.
pub(crate) fn replace(root: &Path, files: &[VolumeFile]) -> Result<()> {
    let what = || format!("open the volume {}", root.display());
    let root = open_in_guest(root, DIRECTORY).context(what)?;
    let is_link = |file: &&VolumeFile| matches!(file.content, Some(Content::Target(_)));
    // The links last: what they lead to is there then.
    let (links, others): (Vec<_>, Vec<_>) = files.iter().partition(is_link);
    for file in others.into_iter().chain(links) {
        put(&root, file).context(|| format!("write {:?} of a volume", file.path))?;
    }
    let wanted: HashSet<&Path> = files.iter().map(|file| Path::new(&file.path)).collect();
    remove_others(&root, Path::new(""), &wanted).context(|| "remove old files of a volume")
}

fn put(root: &OwnedFd, file: &VolumeFile) -> io::Result<()> {
    let path = Path::new(&file.path);
    let usable = path.components().all(|part| matches!(part, Component::Normal(_)));
    let name = path.file_name().filter(|_| usable).ok_or(Errno::INVAL)?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let parent = openat2(root, parent, DIRECTORY, Mode::empty(), resolve)?;
    match &file.content {
        None => directory(&parent, name, file),
        Some(Content::Data(data)) => regular(&parent, name, file, data),
        Some(Content::Target(target)) => link(&parent, name, file, target),
        // The type may grow; a kind that is not known here is none.
        Some(_) => Err(Errno::INVAL),
    }
}

fn directory(parent: &OwnedFd, name: &OsStr, file: &VolumeFile) -> io::Result<()> {
    let made = || match mkdirat(parent, name, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => openat(parent, name, DIRECTORY, Mode::empty()),
        Err(error) => Err(error),
    };
    let made = match made() {
        Err(Errno::NOTDIR | Errno::LOOP) => {
            remove(parent, name, MAX_DEPTH)?;
            made()?
        }
        made => made?,
    };
    own(&made, file)
}

fn regular(parent: &OwnedFd, name: &OsStr, file: &VolumeFile, data: &[u8]) -> io::Result<()> {
    if let Some(same) = same(parent, name, data) {
        return own(&same, file);
    }
    remove(parent, UNFINISHED.as_ref(), MAX_DEPTH)?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut new = File::from(openat(parent, UNFINISHED, flags, Mode::RUSR)?);
    let written = new.write_all(data);
    written.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    let new = OwnedFd::from(new);
    own(&new, file)?;
    let seconds = i64::try_from(file.modified_ns / 1_000_000_000).unwrap_or_default();
    let nanoseconds = i64::try_from(file.modified_ns % 1_000_000_000).unwrap_or_default();
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    futimens(&new, &Timestamps { last_access: time, last_modification: time })?;
    into_place(parent, name)
}

/// The regular file of this name, if it has this content.
fn same(parent: &OwnedFd, name: &OsStr, data: &[u8]) -> Option<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let found = File::from(openat(parent, name, flags, Mode::empty()).ok()?);
    let metadata = found.metadata().ok()?;
    let length = u64::try_from(data.len()).ok()?;
    if !metadata.is_file() || metadata.len() != length {
        return None;
    }
    let mut content = Vec::with_capacity(data.len());
    (&found).take(length + 1).read_to_end(&mut content).ok()?;
    (content == data).then(|| found.into())
}

fn link(parent: &OwnedFd, name: &OsStr, file: &VolumeFile, target: &str) -> io::Result<()> {
    if readlinkat(parent, name, Vec::new()).is_ok_and(|found| found.as_bytes() == target.as_bytes())
    {
        return Ok(());
    }
    remove(parent, UNFINISHED.as_ref(), MAX_DEPTH)?;
    symlinkat(target, parent, UNFINISHED)?;
    let (owner, group) = (Uid::from_raw(file.uid), Gid::from_raw(file.gid));
    chownat(parent, UNFINISHED, Some(owner), Some(group), AtFlags::SYMLINK_NOFOLLOW)?;
    into_place(parent, name)
}

/// Gives the finished file its name, in one step unless a directory has the name.
fn into_place(parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
    match renameat(parent, UNFINISHED, parent, name) {
        Err(Errno::ISDIR) => {
            remove(parent, name, MAX_DEPTH)?;
            renameat(parent, UNFINISHED, parent, name)
        }
        renamed => renamed,
    }
}

/// Sets owner and mode where they differ, so that a file that is the same reports no change.
fn own(fd: &OwnedFd, file: &VolumeFile) -> io::Result<()> {
    let found = fstat(fd)?;
    if (found.st_uid, found.st_gid) != (file.uid, file.gid) {
        fchown(fd, Some(Uid::from_raw(file.uid)), Some(Gid::from_raw(file.gid)))?;
    }
    let mode = Mode::from_raw_mode(file.mode & 0o7777);
    if Mode::from_raw_mode(found.st_mode) != mode {
        // After the owner: a change of the owner takes set-user-ID bits away.
        fchmod(fd, mode)?;
    }
    Ok(())
}

fn remove_others(dir: &OwnedFd, at: &Path, wanted: &HashSet<&Path>) -> io::Result<()> {
    for name in names(dir)? {
        let name = OsStr::from_bytes(name.to_bytes());
        let path: PathBuf = at.join(name);
        if !wanted.contains(path.as_path()) {
            remove(dir, name, MAX_DEPTH)?;
        } else if let Ok(inner) = openat(dir, name, DIRECTORY, Mode::empty()) {
            // No deeper than `wanted`.
            remove_others(&inner, &path, wanted)?;
        }
    }
    Ok(())
}

/// Removes a file or a directory with all that it contains. A missing one is no error.
fn remove(parent: &OwnedFd, name: &OsStr, depth: usize) -> io::Result<()> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(error) => return Err(error),
    }
    let depth = depth.checked_sub(1).ok_or(Errno::LOOP)?;
    let dir = openat(parent, name, DIRECTORY, Mode::empty())?;
    for inner in names(&dir)? {
        remove(&dir, OsStr::from_bytes(inner.to_bytes()), depth)?;
    }
    unlinkat(parent, name, AtFlags::REMOVEDIR)
}

/// Names in a directory.
fn names(dir: impl AsFd) -> io::Result<Vec<CString>> {
    let names = Dir::read_from(dir)?.map(|entry| entry.map(|entry| entry.file_name().to_owned()));
    let names: Vec<CString> = names.collect::<io::Result<_>>()?;
    Ok(names.into_iter().filter(|name| ![&b"."[..], b".."].contains(&name.to_bytes())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
    use std::sync::atomic::{AtomicU32, Ordering};

    /// A directory that is removed when this is dropped.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new() -> Self {
            static NUMBER: AtomicU32 = AtomicU32::new(0);
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let name = format!("isopod-volume-{}-{number}", std::process::id());
            let path = std::env::temp_dir().join(name);
            fs::create_dir(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn file(path: &str, mode: u32, content: Option<Content>) -> VolumeFile {
        // A test may run as any user.
        let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        let modified_ns = 1_700_000_000_000_000_001;
        let path = path.to_owned();
        VolumeFile { path, mode, uid, gid, modified_ns, content, ..VolumeFile::default() }
    }

    fn data(path: &str, text: &str) -> VolumeFile {
        file(path, 0o640, Some(Content::Data(text.into())))
    }

    fn link(path: &str, target: &str) -> VolumeFile {
        file(path, 0o777, Some(Content::Target(target.to_owned())))
    }

    /// A volume as a kubelet writes it.
    fn version(name: &str, text: &str) -> Vec<VolumeFile> {
        vec![
            file(name, 0o755, None),
            data(&format!("{name}/key"), text),
            link("..data", name),
            link("key", "..data/key"),
        ]
    }

    #[test]
    fn a_volume_follows_its_source() {
        let dir = Scratch::new();
        let read = || fs::read_to_string(dir.0.join("key")).unwrap();
        replace(&dir.0, &version("..1", "one")).unwrap();
        assert_eq!(read(), "one");
        let found = fs::metadata(dir.0.join("key")).unwrap();
        assert_eq!((found.permissions().mode() & 0o7777, found.mtime()), (0o640, 1_700_000_000));
        replace(&dir.0, &version("..1", "one")).unwrap();
        let again = fs::metadata(dir.0.join("key")).unwrap();
        let times = |of: &fs::Metadata| (of.ino(), of.ctime(), of.ctime_nsec());
        assert_eq!(times(&again), times(&found), "what is the same is not touched");
        replace(&dir.0, &version("..2", "two")).unwrap();
        assert_eq!(read(), "two");
        let mut names: Vec<_> =
            fs::read_dir(&dir.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["..2", "..data", "key"]);
        replace(&dir.0, &[]).unwrap();
        assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 0);
    }

    #[test]
    fn a_file_takes_the_place_of_any_other() {
        let dir = Scratch::new();
        let outside = Scratch::new();
        fs::write(outside.0.join("key"), "outside").unwrap();
        fs::create_dir_all(dir.0.join("key/deep/deeper")).unwrap();
        symlink(&outside.0, dir.0.join("..1")).unwrap();
        symlink(&outside.0, dir.0.join(UNFINISHED)).unwrap();
        replace(&dir.0, &version("..1", "one")).unwrap();
        assert_eq!(fs::read_to_string(dir.0.join("key")).unwrap(), "one");
        assert_eq!(fs::read_to_string(outside.0.join("key")).unwrap(), "outside");
    }

    #[test]
    fn no_path_leads_out_of_the_volume() {
        let dir = Scratch::new();
        fs::create_dir(dir.0.join("volume")).unwrap();
        symlink("..", dir.0.join("volume/up")).unwrap();
        for path in ["../x", "/x", "", ".", "up/x"] {
            assert!(put_all(&dir.0.join("volume"), path).is_err(), "{path:?}");
        }
        assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 1);
    }

    fn put_all(volume: &Path, path: &str) -> Result<()> {
        replace(volume, &[data(path, "x")])
    }
}

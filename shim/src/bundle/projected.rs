//! Volumes that a kubelet writes and changes: configMap, secret, downward API, and projected ones.
//!
//! The guest has a copy of such a volume, which follows the volume. A change by the host is then a
//! change by the guest too, and inotify(7) reports it to the container. Files that are shared with
//! the host have no such reports.

use std::{
    collections::HashMap,
    ffi::{CStr, OsStr},
    fs::{File, Metadata},
    io::{self, ErrorKind, Read},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, openat, openat2,
        readlinkat, statat,
    },
    io::Errno,
};
use serde::{Deserialize, Serialize};

use super::{id_map::IdMap, shm::Shm};

/// Directory of a kubelet for the volumes of a pod.
const VOLUMES: &str = "volumes";

/// Directories of a kubelet for these volumes of a pod, each below its name.
const KINDS: [&str; 4] = [
    "kubernetes.io~configmap",
    "kubernetes.io~secret",
    "kubernetes.io~downward-api",
    "kubernetes.io~projected",
];

/// The link that a kubelet replaces to change all files at once.
const LINK: &str = "..data";

/// Most bytes of the volumes of a container that are copied. A kubelet writes at most a MiB into a
/// configMap or a secret, and a message to the agent has at most 4 MiB.
pub const MAX_COPIED_BYTES: u64 = 3 << 20;

/// Most bytes of a volume that is copied.
const MAX_BYTES: u64 = 1 << 20;

/// Bytes that a file counts beside its content and its path.
const FILE_BYTES: u64 = 64;

/// Most files of a volume.
const MAX_FILES: usize = 2048;

/// Most directories in one another.
const MAX_DEPTH: usize = 16;

/// Size in bytes of the guest's copy: an old and a new version, with room for their directories.
const COPY_BYTES: u64 = 16 << 20;

/// Most attempts to read a volume that its kubelet changes at the same time.
const ATTEMPTS: u32 = 5;

/// A volume of the host that the guest has a copy of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Projected {
    /// Key of the guest's copy, the same for all containers that mount the volume.
    pub key: String,
    /// Path of the volume on the host, for messages.
    pub path: PathBuf,
}

/// A file of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeFile {
    /// Path relative to the volume.
    pub path: String,
    /// Permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of the last change in nanoseconds since the epoch; 0 if it was earlier.
    pub modified_ns: u64,
    /// Kind and content.
    pub content: VolumeContent,
}

/// Kind and content of a file of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VolumeContent {
    /// A directory.
    Directory,
    /// A regular file.
    Data(Vec<u8>),
    /// A symbolic link, with its target.
    Link(String),
}

/// The volumes of a container that are copied, and what they have left of the limit.
#[derive(Debug)]
pub(super) struct Copies {
    room: u64,
    known: HashMap<String, bool>,
}

impl Default for Copies {
    fn default() -> Self {
        Self { room: MAX_COPIED_BYTES, known: HashMap::new() }
    }
}

impl Copies {
    /// The volume at `source`, if a kubelet writes it and it is small. `found` is the metadata of
    /// `source`, an absolute path without symbolic links. Another volume is shared with the host.
    pub(super) fn of(&mut self, source: &Path, found: &Metadata) -> Option<Projected> {
        let kind = source.parent()?;
        let volumes = kind.parent()?.file_name()?;
        let kind = kind.file_name().and_then(OsStr::to_str)?;
        if !KINDS.contains(&kind) || volumes != VOLUMES || !found.is_dir() {
            return None;
        }
        let key = shm(found, None).key;
        let fits = match self.known.get(&key) {
            Some(fits) => *fits,
            None => self.fits(source),
        };
        self.known.insert(key.clone(), fits);
        fits.then(|| Projected { key, path: source.to_owned() })
    }

    fn fits(&mut self, source: &Path) -> bool {
        let mut room = self.room.min(MAX_BYTES);
        let limit = room;
        let read = openat(CWD, source, DIRECTORY, Mode::empty())
            .map_err(io::Error::from)
            .and_then(|root| read_volume(root.as_fd(), &mut room));
        match read {
            Ok(_) => {
                self.room -= limit - room;
                true
            }
            Err(error) => {
                log::warn!(
                    "the volume {} is shared, so inotify reports no changes: {error}",
                    source.display()
                );
                false
            }
        }
    }
}

/// The guest's tmpfs for the copy of a volume with the metadata `found`.
pub(super) fn shm(found: &Metadata, map: Option<&IdMap>) -> Shm {
    Shm { executable: true, ..Shm::in_place_of(found, COPY_BYTES, map) }
}

const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// State of a volume that is another one after a change by its kubelet.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VolumeState {
    link: Option<Vec<u8>>,
    /// Change of the names in the volume, and of their owner.
    changed: Option<(i64, u64)>,
}

impl VolumeState {
    /// The state of the volume at `root` now.
    pub fn of(root: BorrowedFd<'_>) -> Self {
        let changed = fstat(root).ok();
        Self {
            link: link(root).ok(),
            changed: changed.map(|found| (found.st_ctime, found.st_ctime_nsec)),
        }
    }
}

fn link(root: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    Ok(readlinkat(root, LINK, Vec::new())?.into_bytes())
}

/// Reads all files of the volume at `root`, at most `room` bytes, and lowers `room` by them. A
/// directory comes before what it contains.
///
/// Containers may be able to write to a directory that is named as such a volume is. So no step
/// follows a symbolic link, or crosses a mount.
///
/// # Errors
///
/// If there is no `..data`, or the volume is too large for a copy. Of the kind
/// [`ErrorKind::Interrupted`] if the kubelet changes the volume all the time.
pub fn read_volume(root: BorrowedFd<'_>, room: &mut u64) -> io::Result<Vec<VolumeFile>> {
    let whole = *room;
    for _ in 0..ATTEMPTS {
        let before = link(root)?;
        *room = whole;
        match walk(root, room) {
            // The old version is removed after the swap, so this is one version.
            Ok(files) if link(root).is_ok_and(|after| after == before) => return Ok(files),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::new(ErrorKind::Interrupted, "it changes all the time"))
}

fn walk(root: BorrowedFd<'_>, room: &mut u64) -> io::Result<Vec<VolumeFile>> {
    let device = fstat(root)?.st_dev;
    let mut files = Vec::new();
    let mut next = vec![PathBuf::new()];
    while let Some(dir) = next.pop() {
        if dir.components().count() > MAX_DEPTH {
            return Err(io::Error::other(format!("it has more than {MAX_DEPTH} levels")));
        }
        let at = if dir.as_os_str().is_empty() { Path::new(".") } else { &dir };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let at = openat2(root, at, DIRECTORY, Mode::empty(), resolve)?;
        let mut names = Vec::new();
        for entry in Dir::read_from(&at)? {
            let name = entry?.file_name().to_owned();
            if [c".", c".."].contains(&name.as_c_str()) {
                continue;
            }
            if files.len() + names.len() >= MAX_FILES {
                return Err(io::Error::other(format!("it has more than {MAX_FILES} files")));
            }
            names.push(name);
        }
        names.sort();
        for name in names {
            let path = dir.join(OsStr::from_bytes(name.to_bytes()));
            let file = read_file(&at, &name, &path, device, room)?;
            if file.content == VolumeContent::Directory {
                next.push(path);
            }
            files.push(file);
        }
    }
    Ok(files)
}

fn read_file(
    dir: &OwnedFd,
    name: &CStr,
    path: &Path,
    device: u64,
    room: &mut u64,
) -> io::Result<VolumeFile> {
    let text = |path: &Path| {
        let text = path.to_str().map(str::to_owned);
        text.ok_or_else(|| io::Error::other(format!("{} is not UTF-8", path.display())))
    };
    let path = text(path)?;
    let mut found = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if found.st_dev != device {
        return Err(io::Error::other(format!("{path} is a mount")));
    }
    take(room, path.len())?;
    let content = match FileType::from_raw_mode(found.st_mode) {
        FileType::Directory => VolumeContent::Directory,
        FileType::Symlink => {
            let target = readlinkat(dir, name, Vec::new())?.into_bytes();
            take(room, target.len())?;
            VolumeContent::Link(text(Path::new(OsStr::from_bytes(&target)))?)
        }
        FileType::RegularFile => {
            // The file may be another one by now: a named pipe would block.
            let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            let file = openat(dir, name, OFlags::RDONLY | flags, Mode::empty())?;
            found = fstat(&file)?;
            if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
                return Err(Errno::NOENT.into());
            }
            let mut data = Vec::new();
            File::from(file).take(*room + 1).read_to_end(&mut data)?;
            take(room, data.len())?;
            VolumeContent::Data(data)
        }
        _ => return Err(io::Error::other(format!("{path} is a special file"))),
    };
    let Stat { st_mode, st_uid, st_gid, st_mtime, st_mtime_nsec, .. } = found;
    let seconds = u64::try_from(st_mtime).unwrap_or_default();
    Ok(VolumeFile {
        path,
        mode: st_mode & 0o7777,
        uid: st_uid,
        gid: st_gid,
        // A time after the year 2554 does not fit.
        modified_ns: seconds.saturating_mul(1_000_000_000).saturating_add(st_mtime_nsec),
        content,
    })
}

/// Takes the bytes of a file from the room.
fn take(room: &mut u64, bytes: usize) -> io::Result<()> {
    let bytes = u64::try_from(bytes).unwrap_or(u64::MAX).saturating_add(FILE_BYTES);
    *room =
        room.checked_sub(bytes).ok_or_else(|| io::Error::other("it is too large for a copy"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        fs,
        os::unix::fs::{PermissionsExt, symlink},
    };

    fn volume(root: &Path, kind: &str) -> PathBuf {
        let path = root.join("volumes").join(kind).join("config");
        fs::create_dir_all(path.join("..1/sub")).unwrap();
        fs::write(path.join("..1/sub/key"), "value").unwrap();
        fs::set_permissions(path.join("..1/sub/key"), fs::Permissions::from_mode(0o755)).unwrap();
        symlink("..1", path.join(LINK)).unwrap();
        symlink("..data/sub", path.join("sub")).unwrap();
        path
    }

    fn of(path: &Path) -> Option<Projected> {
        Copies::default().of(path, &fs::metadata(path).unwrap())
    }

    fn read(path: &Path) -> io::Result<Vec<VolumeFile>> {
        let root = File::open(path).unwrap();
        read_volume(root.as_fd(), &mut MAX_BYTES.clone())
    }

    #[test]
    fn a_small_volume_of_a_kubelet_is_read_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = volume(dir.path(), "kubernetes.io~secret");
        let found = of(&path).unwrap();
        let files = read(&path).unwrap();
        let paths: Vec<_> = files.iter().map(|file| file.path.as_str()).collect();
        assert_eq!(paths, ["..1", "..data", "sub", "..1/sub", "..1/sub/key"]);
        let key = &files[4];
        assert_eq!((key.mode, &key.content), (0o755, &VolumeContent::Data(b"value".to_vec())));
        assert_eq!(files[1].content, VolumeContent::Link("..1".into()));
        let shm = shm(&fs::metadata(&path).unwrap(), None);
        assert!(shm.executable && shm.key == found.key, "{shm:?}");
    }

    #[test]
    fn other_volumes_are_shared_with_the_host() {
        let dir = tempfile::tempdir().unwrap();
        let path = volume(dir.path(), "kubernetes.io~configmap");
        assert!(of(&path).is_some());
        assert!(of(path.parent().unwrap()).is_none());
        assert!(of(&volume(dir.path(), "kubernetes.io~empty-dir")).is_none());
        let elsewhere = dir.path().join("kubernetes.io~configmap");
        fs::rename(path.parent().unwrap(), &elsewhere).unwrap();
        assert!(of(&elsewhere.join("config")).is_none());
        fs::rename(&elsewhere, path.parent().unwrap()).unwrap();
        fs::write(path.join("..1/large"), vec![0; MAX_BYTES as usize]).unwrap();
        assert!(of(&path).is_none());
        fs::remove_file(path.join("..1/large")).unwrap();
        fs::remove_file(path.join(LINK)).unwrap();
        assert!(of(&path).is_none());
    }

    #[test]
    fn the_volumes_of_a_container_have_a_limit_together() {
        let mut copies = Copies::default();
        let dirs: Vec<_> = (0..4).map(|_| tempfile::tempdir().unwrap()).collect();
        let copied: Vec<bool> = dirs
            .iter()
            .map(|dir| {
                let path = volume(dir.path(), "kubernetes.io~configmap");
                fs::write(path.join("..1/large"), vec![0; 900 << 10]).unwrap();
                let found = fs::metadata(&path).unwrap();
                let copied = copies.of(&path, &found).is_some();
                // Once more is the same volume.
                assert_eq!(copies.of(&path, &found).is_some(), copied);
                copied
            })
            .collect();
        assert_eq!(copied, [true, true, true, false]);
    }

    #[test]
    fn no_link_leads_out_of_a_volume() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), "outside").unwrap();
        let path = volume(dir.path(), "kubernetes.io~secret");
        symlink(outside.path(), path.join("..1/link")).unwrap();
        let files = read(&path).unwrap();
        assert!(files.iter().all(|file| !file.path.contains("secret")), "{files:?}");
        // A directory that becomes a link between the look at its parent and the look at it.
        let root = File::open(&path).unwrap();
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let opened = openat2(&root, "..1/link", OFlags::DIRECTORY, Mode::empty(), resolve);
        assert_eq!(opened.unwrap_err(), Errno::LOOP);
    }

    #[test]
    fn a_swap_is_another_state() {
        let dir = tempfile::tempdir().unwrap();
        let path = volume(dir.path(), "kubernetes.io~secret");
        let root = File::open(&path).unwrap();
        let before = VolumeState::of(root.as_fd());
        assert_eq!(VolumeState::of(root.as_fd()), before);
        fs::create_dir(path.join("..2")).unwrap();
        symlink("..2", path.join("..new")).unwrap();
        fs::rename(path.join("..new"), path.join(LINK)).unwrap();
        assert_ne!(VolumeState::of(root.as_fd()), before);
    }
}

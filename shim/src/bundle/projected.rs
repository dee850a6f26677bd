//! Volumes that a kubelet writes and changes: configMap, secret, downward API, and projected ones.
//!
//! The guest has a copy of such a volume, which follows the volume. A change by the host is then a
//! change by the guest too, and inotify(7) reports it to the container. Files that are shared with
//! the host have no such reports.

use std::{
    ffi::OsStr,
    fs::{self, File, Metadata, OpenOptions},
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::{id_map::IdMap, shm::Shm};

/// Directories of a kubelet for these volumes of a pod, each below its name.
const KINDS: [&str; 4] = [
    "kubernetes.io~configmap",
    "kubernetes.io~secret",
    "kubernetes.io~downward-api",
    "kubernetes.io~projected",
];

/// The link that a kubelet replaces to change all files at once.
const LINK: &str = "..data";

/// Most bytes of a volume's files. A kubelet writes at most a MiB into a configMap or a secret.
const MAX_BYTES: u64 = 1 << 20;

/// Most bytes of a volume that has grown since its container was made. A message to the agent has
/// at most 4 MiB.
const MAX_GROWN_BYTES: u64 = 3 << 20;

/// Most files of a volume.
const MAX_FILES: usize = 2048;

/// Size in bytes of the guest's copy: an old and a new version, with room for their directories.
const COPY_BYTES: u64 = 16 << 20;

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

impl Projected {
    /// The volume at `source`, if a kubelet writes it and it is small. `found` is the metadata of
    /// `source`, an absolute path without symbolic links.
    pub(super) fn of(source: &Path, found: &Metadata) -> Option<Self> {
        let kind = source.parent()?.file_name().and_then(OsStr::to_str)?;
        let link = fs::symlink_metadata(source.join(LINK)).ok()?;
        if !KINDS.contains(&kind) || !found.is_dir() || !link.is_symlink() {
            return None;
        }
        let key = shm(found, None).key;
        // Another volume is shared with the host, and changes without reports.
        read_at_most(source, MAX_BYTES).ok()?;
        Some(Self { key, path: source.to_owned() })
    }
}

/// The guest's tmpfs for the copy of a volume with the metadata `found`.
pub(super) fn shm(found: &Metadata, map: Option<&IdMap>) -> Shm {
    Shm { executable: true, ..Shm::in_place_of(found, COPY_BYTES, map) }
}

/// Reads all files of the volume at `root`. A directory comes before what it contains.
///
/// # Errors
///
/// If the kubelet changes the volume meanwhile, or the volume is too large for a copy.
pub fn read_volume(root: &Path) -> io::Result<Vec<VolumeFile>> {
    read_at_most(root, MAX_GROWN_BYTES)
}

fn read_at_most(root: &Path, bytes: u64) -> io::Result<Vec<VolumeFile>> {
    let mut files = Vec::new();
    let mut room = bytes;
    let mut next = vec![PathBuf::new()];
    while let Some(dir) = next.pop() {
        let mut names: Vec<_> = fs::read_dir(root.join(&dir))?
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<io::Result<_>>()?;
        names.sort();
        for name in names {
            let path = dir.join(name);
            if files.len() >= MAX_FILES {
                return Err(io::Error::other(format!("it has more than {MAX_FILES} files")));
            }
            let file = read_file(root, &path, &mut room)?;
            if file.content == VolumeContent::Directory {
                next.push(path);
            }
            files.push(file);
        }
    }
    Ok(files)
}

/// Reads one file. `room` is the number of bytes that it may have, and is lowered by those.
fn read_file(root: &Path, path: &Path, room: &mut u64) -> io::Result<VolumeFile> {
    let full = root.join(path);
    let found = fs::symlink_metadata(&full)?;
    let kind = found.file_type();
    let text = |path: &Path| {
        let text = path.to_str().map(str::to_owned);
        text.ok_or_else(|| io::Error::other(format!("{} is not UTF-8", path.display())))
    };
    let content = if kind.is_dir() {
        VolumeContent::Directory
    } else if kind.is_symlink() {
        VolumeContent::Link(text(&fs::read_link(&full)?)?)
    } else if kind.is_file() {
        VolumeContent::Data(data(&full, room)?)
    } else {
        return Err(io::Error::other(format!("{} is a special file", path.display())));
    };
    let modified = found.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(VolumeFile {
        path: text(path)?,
        mode: found.mode() & 0o7777,
        uid: found.uid(),
        gid: found.gid(),
        modified_ns: u64::try_from(modified.as_nanos()).unwrap_or_default(),
        content,
    })
}

/// Content of a regular file.
fn data(path: &Path, room: &mut u64) -> io::Result<Vec<u8>> {
    // The file may be another one by now: a named pipe would block.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file: File =
        OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(path)?;
    let mut data = Vec::new();
    let length = file.take(*room + 1).read_to_end(&mut data)?;
    let left = u64::try_from(length).ok().and_then(|length| room.checked_sub(length));
    *room = left.ok_or_else(|| io::Error::other("its files are too large for a copy"))?;
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

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
        Projected::of(path, &fs::metadata(path).unwrap())
    }

    #[test]
    fn a_small_volume_of_a_kubelet_is_read_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = volume(dir.path(), "kubernetes.io~secret");
        let found = of(&path).unwrap();
        let files = read_volume(&path).unwrap();
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
        fs::write(path.join("..1/large"), vec![0; (MAX_BYTES + 1) as usize]).unwrap();
        assert!(of(&path).is_none());
        // One that has grown is copied for a while.
        assert_eq!(read_volume(&path).unwrap().len(), 6);
        fs::remove_file(path.join("..1/large")).unwrap();
        fs::remove_file(path.join(LINK)).unwrap();
        assert!(of(&path).is_none());
    }
}

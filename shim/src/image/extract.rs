//! Applies a layer's entries to the tree (image-spec layer.md, "Applying Changesets").
//!
//! Where the specification is unclear, the result is as with umoci and containerd:
//!
//! - Parents are followed through symbolic links, within the tree.
//! - A file is replaced by an entry of any kind, and a directory only by an entry that is no
//!   directory.
//! - The last of several entries of one name holds.

use std::{
    ffi::{CStr, CString},
    fs::File,
    io::{self, Read, Write},
};

use rustix::{
    fs::{
        AtFlags, FileType, Mode, OFlags, Stat, futimens, linkat, makedev, mkdirat, mknodat, openat,
        statat, symlinkat,
    },
    io::Errno,
};

use crate::{
    error::{Error, Explain, Result},
    image::{
        archive::{Archive, Entry, Kind},
        metadata,
        name::{Name, name, parts},
        remove::{DIRECTORY, remove_tree},
        tree::{Directory, Tree, times},
        watch::Watch,
    },
    text::quoted,
};

/// Bytes of a file to copy at once.
const CHUNK: usize = 128 << 10;

/// Applies all entries of `archive`. The error names the first entry that cannot be applied.
pub(super) fn apply<R: Read>(
    archive: &mut Archive<R>,
    tree: &mut Tree,
    watch: &Watch,
) -> Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        watch.check()?;
        let next = archive.next().explain(|| "it cannot be read".into())?;
        let Some(entry) = next else { return Ok(()) };
        let mut content = |file: &File| copy(archive, file, &mut buffer, watch);
        apply_entry(&entry, &mut content, tree)
            .explain(|| format!("entry {}", quoted(&entry.path)))?;
    }
}

fn apply_entry(
    entry: &Entry,
    content: &mut dyn FnMut(&File) -> Result<()>,
    tree: &mut Tree,
) -> Result<()> {
    let path = parts(&entry.path)?;
    match name(&path)? {
        Name::Foreign => Ok(()),
        Name::Whiteout(parents, hidden) => {
            let hidden = c_string(hidden)?;
            hide(tree, parents, Some(&hidden))
        }
        Name::Opaque(parents) => hide(tree, parents, None),
        Name::Root if entry.kind == Kind::Directory => {
            let root = tree.root()?;
            metadata::clear_xattrs(&root.fd)?;
            metadata::set(&root.fd, entry)
        }
        Name::Root => Err(Error::new("the root has to be a directory")),
        Name::File(parents, name) => {
            let name = c_string(name)?;
            let target = link_target(entry, tree)?;
            let parent = tree.directory(parents, true)?;
            let parent = parent.ok_or_else(|| Error::new("its directory is gone"))?;
            let before = times(&parent.fd).explain(|| "its directory".into())?;
            place(entry, content, &parent, &name, target.as_ref())?;
            tree.keep(&parent, &name);
            futimens(&parent.fd, &before).explain(|| "cannot set its directory's time".into())
        }
    }
}

fn hide(tree: &mut Tree, parents: &[&[u8]], name: Option<&CStr>) -> Result<()> {
    // A name that is not there need not be hidden.
    let Some(directory) = tree.directory(parents, false)? else { return Ok(()) };
    tree.hide(&directory, name).explain(|| "cannot remove what it hides".into())
}

/// The target of a hard link.
struct Target {
    directory: Directory,
    name: CString,
    stat: Stat,
}

fn link_target(entry: &Entry, tree: &mut Tree) -> Result<Option<Target>> {
    if entry.kind != Kind::HardLink {
        return Ok(None);
    }
    let target = || format!("its target {}", quoted(&entry.link));
    let path = parts(&entry.link).explain(target)?;
    let missing = || Error::new(format!("{} is not there", target()));
    let Some((last, parents)) = path.split_last() else { return Err(missing()) };
    let directory = tree.directory(parents, false)?.ok_or_else(missing)?;
    let name = c_string(last)?;
    match statat(&directory.fd, &*name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) if file_type(&stat) == FileType::Directory => {
            Err(Error::new(format!("{} is a directory", target())))
        }
        Ok(stat) => Ok(Some(Target { directory, name, stat })),
        Err(Errno::NOENT) => Err(missing()),
        Err(error) => Err(error).explain(target),
    }
}

/// Makes the file `name` in `parent`, in place of an existing file.
fn place(
    entry: &Entry,
    content: &mut dyn FnMut(&File) -> Result<()>,
    parent: &Directory,
    name: &CStr,
    target: Option<&Target>,
) -> Result<()> {
    let dir = &parent.fd;
    let old = match statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Some(stat),
        Err(Errno::NOENT) => None,
        Err(error) => return cannot("look at it", Err(error)),
    };
    let same = |stat: &Stat| target.is_some_and(|target| target.stat.st_ino == stat.st_ino);
    match &old {
        // The name is a link to the target already. Its removal could lose the target's only name.
        Some(stat) if same(stat) => return Ok(()),
        Some(stat) if file_type(stat) == FileType::Directory && entry.kind == Kind::Directory => {
            let fd = openat(dir, name, DIRECTORY, Mode::empty());
            let fd = cannot("open it", fd)?;
            metadata::clear_xattrs(&fd)?;
            return metadata::set(&fd, entry);
        }
        // An existing file is never written into: its other names are other files from now on.
        Some(_) => cannot("remove what was there before", remove_tree(dir, name))?,
        None => {}
    }
    let node = |kind, device| mknodat(dir, name, kind, Mode::RUSR | Mode::WUSR, device);
    match entry.kind {
        Kind::File => {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
            let file = openat(dir, name, flags | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR);
            let file = File::from(cannot("create it", file)?);
            content(&file)?;
            return metadata::set(&file.into(), entry);
        }
        Kind::Directory => {
            cannot("create it", mkdirat(dir, name, Mode::RWXU))?;
            let fd = cannot("open it", openat(dir, name, DIRECTORY, Mode::empty()))?;
            return metadata::set(&fd, entry);
        }
        Kind::HardLink => {
            let Some(target) = target else { return Ok(()) };
            let flags = AtFlags::empty();
            // Owner and mode are those of the target, which has an entry of its own.
            return cannot(
                "link it",
                linkat(&target.directory.fd, &*target.name, dir, name, flags),
            );
        }
        Kind::Symlink => {
            let link = c_string(&entry.link)?;
            if link.is_empty() {
                return Err(Error::new("it is a symbolic link to nothing"));
            }
            cannot("create it", symlinkat(&*link, dir, name))?;
        }
        Kind::Fifo => cannot("create it", node(FileType::Fifo, 0))?,
        Kind::CharDevice(major, minor) => {
            cannot("create the device", node(FileType::CharacterDevice, makedev(major, minor)))?;
        }
        Kind::BlockDevice(major, minor) => {
            cannot("create the device", node(FileType::BlockDevice, makedev(major, minor)))?;
        }
    }
    metadata::set_at(dir, name, entry)
}

/// Writes the rest of an entry's content to `file`.
fn copy<R: Read>(
    archive: &mut Archive<R>,
    mut file: &File,
    buffer: &mut [u8],
    watch: &Watch,
) -> Result<()> {
    loop {
        watch.check()?;
        let n = match archive.read(buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => {
                return Err(e).explain(|| "its content".into());
            }
        };
        file.write_all(&buffer[..n]).map_err(write_error)?;
    }
}

fn write_error(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::because(
            "no room for its content; the bundle needs a file system with more space",
            error,
        ),
        _ => Error::because("cannot write its content", error),
    }
}

fn cannot<T>(what: &str, result: rustix::io::Result<T>) -> Result<T> {
    result.map_err(|error| match error {
        Errno::NOSPC | Errno::DQUOT => Error::because(
            format!("cannot {what}; the bundle needs a file system with more space and inodes"),
            error,
        ),
        error => Error::because(format!("cannot {what}"), error),
    })
}

fn file_type(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

fn c_string(bytes: &[u8]) -> Result<CString> {
    CString::new(bytes).map_err(|_| Error::new(format!("{} has a NUL byte", quoted(bytes))))
}

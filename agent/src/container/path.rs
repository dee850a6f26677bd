//! Paths inside a container's root file system, which is hostile. Its symbolic links may point
//! anywhere, and another container may change it meanwhile.
//!
//! Every step uses `openat2` with `RESOLVE_IN_ROOT`, so the kernel itself keeps `..` and links
//! inside the root. Callers get descriptors, not paths.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

/// Most symbolic links followed on the way, as in the kernel.
const MAX_LINKS: u32 = 40;

/// Type of the file to make for a missing path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    Directory,
    File,
}

/// Opens an existing path below `root`.
pub(crate) fn open(root: impl AsFd, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let relative = path.strip_prefix("/").unwrap_or(path);
    let relative = if relative.as_os_str().is_empty() { Path::new(".") } else { relative };
    let flags = flags | OFlags::CLOEXEC;
    openat2(root, relative, flags, Mode::empty(), ResolveFlags::IN_ROOT)
}

/// Opens a path below `root` as a mount point, and makes its missing components. A dangling
/// symbolic link is followed to its target inside the root. After 40 links the error is `ELOOP`.
pub(crate) fn open_or_make(root: impl AsFd, path: &Path, make: Missing) -> Result<OwnedFd, Errno> {
    match open(&root, path, OFlags::PATH) {
        Err(Errno::NOENT) => {}
        result => return result,
    }
    let mut todo: VecDeque<OsString> = components(path).collect();
    let mut done = PathBuf::new();
    let mut links = 0;
    while let Some(name) = todo.pop_front() {
        if name == ".." {
            done.pop();
            continue;
        }
        let parent = open(&root, &done, OFlags::PATH | OFlags::DIRECTORY)?;
        match rustix::fs::readlinkat(&parent, &name, Vec::new()) {
            Ok(target) => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(Errno::LOOP);
                }
                let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
                if target.is_absolute() {
                    done.clear();
                }
                for part in components(&target).collect::<Vec<_>>().into_iter().rev() {
                    todo.push_front(part);
                }
                continue;
            }
            Err(Errno::INVAL) => {}
            Err(Errno::NOENT) => {
                let last = todo.is_empty();
                make_one(&parent, &name, if last { make } else { Missing::Directory })?;
            }
            Err(e) => return Err(e),
        }
        done.push(name);
    }
    open(root, &done, OFlags::PATH)
}

fn components(path: &Path) -> impl Iterator<Item = OsString> + '_ {
    path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    })
}

fn make_one(parent: &OwnedFd, name: &OsStr, make: Missing) -> Result<(), Errno> {
    let made = match make {
        Missing::Directory => rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)),
        Missing::File => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mode = Mode::from_raw_mode(0o644);
            rustix::fs::openat(parent, name, flags | OFlags::WRONLY, mode).map(drop)
        }
    };
    match made {
        // Another process has made it meanwhile.
        Err(Errno::EXIST) => Ok(()),
        made => made,
    }
}

/// Opens the parent directory of `path`, and makes it if it is missing. Also returns the last
/// component of the path; without one the error is `EINVAL`.
pub(crate) fn open_parent(root: impl AsFd, path: &Path) -> Result<(OwnedFd, OsString), Errno> {
    let name = path.file_name().ok_or(Errno::INVAL)?;
    let parent = open_or_make(root, path.parent().unwrap_or(Path::new("/")), Missing::Directory)?;
    Ok((parent, name.to_owned()))
}

/// Returns true if a descriptor refers to a directory.
pub(crate) fn is_dir(fd: impl AsFd) -> Result<bool, Errno> {
    let stat = rustix::fs::fstat(fd)?;
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

/// Opens a path of the guest itself.
pub(crate) fn open_in_guest(path: impl AsRef<OsStr>, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(CWD, path.as_ref().as_bytes(), flags | OFlags::CLOEXEC, Mode::empty())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    struct Root(PathBuf, OwnedFd);

    impl Drop for Root {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(self.0.parent().unwrap());
        }
    }

    fn root(name: &str) -> Root {
        let outer = std::env::temp_dir().join(format!("isopod-path-{}-{name}", std::process::id()));
        let root = outer.join("root");
        fs::create_dir_all(&root).unwrap();
        let fd = open_in_guest(&root, OFlags::PATH).unwrap();
        Root(root, fd)
    }

    #[test]
    fn missing_parts_are_made() {
        let root = root("missing");
        open_or_make(&root.1, Path::new("/a/b/c"), Missing::Directory).unwrap();
        open_or_make(&root.1, Path::new("/a/f"), Missing::File).unwrap();
        assert!(root.0.join("a/b/c").is_dir());
        assert!(root.0.join("a/f").is_file());
        assert!(is_dir(open(&root.1, Path::new("/a/b"), OFlags::PATH).unwrap()).unwrap());
    }

    #[test]
    fn links_stay_inside() {
        let root = root("links");
        let outside = root.0.parent().unwrap().join("outside");
        symlink(&outside, root.0.join("absolute")).unwrap();
        symlink("../../../outside2", root.0.join("relative")).unwrap();
        open_or_make(&root.1, Path::new("/absolute/x"), Missing::File).unwrap();
        open_or_make(&root.1, Path::new("/relative/x"), Missing::Directory).unwrap();
        assert!(!outside.exists());
        assert!(!root.0.parent().unwrap().join("outside2").exists());
        assert!(root.0.join("outside2/x").is_dir());
        assert!(root.0.join(outside.strip_prefix("/").unwrap()).join("x").is_file());
    }

    #[test]
    fn loops_end() {
        let root = root("loops");
        symlink("b", root.0.join("a")).unwrap();
        symlink("a", root.0.join("b")).unwrap();
        let e = open_or_make(&root.1, Path::new("/a/x"), Missing::File).unwrap_err();
        assert_eq!(e, Errno::LOOP);
    }
}

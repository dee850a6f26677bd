//! A host's root file system, which an installer in a container sees below a directory.
//!
//! Symbolic links are followed as on the host itself, so none leads out of the directory.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read},
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Mode, OFlags, ResolveFlags, openat2},
    io::Errno,
};

use crate::error::{Error, Explain, Result};

/// Folders in which services of a host find programs, in the order of their search.
pub(super) const PROGRAM_FOLDERS: [&str; 4] =
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin"];

/// Largest configuration file that is read, in bytes.
const MAX_FILE: u64 = 16 << 20;

/// The root file system of a host.
#[derive(Debug)]
pub(super) struct Host {
    root: OwnedFd,
}

impl Host {
    /// Opens the root directory, as this process sees it.
    pub(super) fn open(root: &Path) -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(root, flags, Mode::empty())
            .explain(|| format!("cannot open the root directory {}", root.display()))?;
        Ok(Self { root })
    }

    /// Path of a file for this process, with all links followed. None if there is no such file.
    pub(super) fn find(&self, path: &Path) -> Result<Option<PathBuf>> {
        let what = || format!("cannot open {}", path.display());
        let file = match self.look(path, OFlags::empty()) {
            Ok(file) => file,
            Err(Errno::NOENT) if self.look(path, OFlags::NOFOLLOW).is_ok() => {
                return Err(Error::new(format!(
                    "{} is a symbolic link to nothing",
                    path.display()
                )));
            }
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(errno) => return Err(errno).explain(what),
        };
        fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).map(Some).explain(what)
    }

    /// Text of a file. None if there is no such file.
    pub(super) fn read(&self, path: &Path) -> Result<Option<String>> {
        let Some(place) = self.find(path)? else { return Ok(None) };
        let what = || format!("cannot read {}", path.display());
        // Opening a pipe would wait for a writer.
        if !fs::metadata(&place).explain(what)?.is_file() {
            return Err(Error::new(format!("{} is not a regular file", path.display())));
        }
        let mut bytes = Vec::new();
        let file = File::open(&place).explain(what)?;
        file.take(MAX_FILE + 1).read_to_end(&mut bytes).explain(what)?;
        if bytes.len() as u64 > MAX_FILE {
            return Err(Error::new(format!("{} is larger than 16 MiB", path.display())));
        }
        let text = String::from_utf8(bytes)
            .map_err(|_| Error::new(format!("{} is not UTF-8 text", path.display())))?;
        Ok(Some(text))
    }

    /// The files that exist, with their texts.
    pub(super) fn read_all(
        &self,
        paths: impl IntoIterator<Item = PathBuf>,
    ) -> Result<Vec<(PathBuf, String)>> {
        let mut found = Vec::new();
        for path in paths {
            if let Some(text) = self.read(&path)? {
                found.push((path, text));
            }
        }
        Ok(found)
    }

    /// Target of a symbolic link, as it is written. None if the path is no symbolic link.
    pub(super) fn link(&self, path: &Path) -> Result<Option<PathBuf>> {
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Ok(None);
        };
        let Some(folder) = self.find(folder)? else { return Ok(None) };
        match fs::read_link(folder.join(name)) {
            Ok(target) => Ok(Some(target)),
            // EINVAL: there is something else.
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::InvalidInput) => Ok(None),
            Err(e) => Err(e).explain(|| format!("cannot read the link {}", path.display())),
        }
    }

    /// Files of a folder whose names begin and end so, in alphabetical order. Empty without the
    /// folder.
    pub(super) fn list(&self, folder: &Path, begin: &str, end: &str) -> Result<Vec<PathBuf>> {
        let Some(place) = self.find(folder)? else { return Ok(Vec::new()) };
        let what = || format!("cannot list {}", folder.display());
        let mut found = Vec::new();
        for entry in fs::read_dir(place).explain(what)? {
            let name = entry.explain(what)?.file_name();
            let Some(text) = name.to_str() else { continue };
            let fits = text.len() >= begin.len() + end.len()
                && text.starts_with(begin)
                && text.ends_with(end);
            // A shell's pattern does not find hidden files.
            if fits && (begin.starts_with('.') || !text.starts_with('.')) {
                found.push(folder.join(text));
            }
        }
        found.sort();
        Ok(found)
    }

    /// Tells whether a service of the host finds a program of this name.
    pub(super) fn has_program(&self, name: &str) -> bool {
        PROGRAM_FOLDERS
            .iter()
            .any(|folder| matches!(self.find(&Path::new(folder).join(name)), Ok(Some(_))))
    }

    fn look(&self, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let flags = flags | OFlags::PATH | OFlags::CLOEXEC;
        openat2(&self.root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_are_those_of_the_host() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        fs::create_dir_all(at("etc/a")).unwrap();
        fs::create_dir_all(at("opt")).unwrap();
        fs::write(at("opt/file"), "text").unwrap();
        symlink("/opt/file", at("etc/a/absolute")).unwrap();
        symlink("../../../../../opt/file", at("etc/a/upward")).unwrap();
        symlink("/nowhere", at("etc/a/nowhere")).unwrap();
        let host = Host::open(dir.path()).unwrap();
        for name in ["/etc/a/absolute", "/etc/a/upward", "/opt/file"] {
            assert_eq!(host.find(Path::new(name)).unwrap().unwrap(), at("opt/file"), "{name}");
            assert_eq!(host.read(Path::new(name)).unwrap().unwrap(), "text");
        }
        assert_eq!(host.read(Path::new("/etc/b")).unwrap(), None);
        assert_eq!(host.read(Path::new("/opt/file/x")).unwrap(), None);
        for (name, why) in [("nowhere", "a symbolic link to nothing"), ("", "not a regular file")] {
            let error = host.read(&Path::new("/etc/a").join(name)).unwrap_err();
            assert!(error.message.ends_with(why), "{error}");
        }
        fs::write(at("opt/bytes"), [0xff]).unwrap();
        let error = host.read(Path::new("/opt/bytes")).unwrap_err();
        assert!(error.message.ends_with("not UTF-8 text"), "{error}");
        let link = host.link(Path::new("/etc/a/nowhere")).unwrap();
        assert_eq!(link.unwrap(), Path::new("/nowhere"));
        assert_eq!(host.link(Path::new("/opt/file")).unwrap(), None);
        assert_eq!(host.link(Path::new("/none/file")).unwrap(), None);
    }

    #[test]
    fn a_folder_is_listed_as_a_pattern_would() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.toml", "a.toml", ".c.toml", "d.conf"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let host = Host::open(dir.path()).unwrap();
        let list = |begin, end| host.list(Path::new("/"), begin, end).unwrap();
        assert_eq!(list("", ".toml"), [Path::new("/a.toml"), Path::new("/b.toml")]);
        assert_eq!(list("b", ".toml"), [Path::new("/b.toml")]);
        assert!(host.list(Path::new("/none"), "", "").unwrap().is_empty());
    }
}

//! A change of one file or link of a host: shown, or made at once and whole.

use std::{
    fs::{self, File, Metadata},
    io::{ErrorKind, Write},
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use rustix::fs::{Gid, Uid, XattrFlags, fchown, getxattr, setxattr};
use similar::TextDiff;

use super::host::Host;
use crate::error::{Error, Explain, Result};

/// Extended attribute of folders that `install` has made. `uninstall` removes them with their last
/// file.
const MADE_MARK: &str = "trusted.isopod.made";

/// Mode of a new configuration file.
const NEW_FILE_MODE: u32 = 0o644;

/// A change of one file or link. Paths are those on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    /// Another text for a file. None for a file that does not exist.
    File { path: PathBuf, before: Option<String>, after: Option<String> },
    /// A new symbolic link.
    Link { path: PathBuf, target: PathBuf },
    /// The removal of a symbolic link.
    Unlink { path: PathBuf, target: PathBuf },
}

impl Change {
    /// A change of a file; none if the texts are equal.
    pub(super) fn file(
        path: impl Into<PathBuf>,
        before: Option<String>,
        after: Option<String>,
    ) -> Option<Self> {
        (before != after).then(|| Self::File { path: path.into(), before, after })
    }

    /// The change as a unified diff, or as a line for a link.
    pub(super) fn diff(&self) -> String {
        let (path, before, after) = match self {
            Self::File { path, before, after } => (path, before, after),
            Self::Link { path, target } => {
                return format!("+link {} -> {}\n", path.display(), target.display());
            }
            Self::Unlink { path, target } => {
                return format!("-link {} -> {}\n", path.display(), target.display());
            }
        };
        let name = |text: &Option<String>| match text {
            Some(_) => path.display().to_string(),
            None => "/dev/null".to_owned(),
        };
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let (old, new) = (text(before), text(after));
        let diff = TextDiff::from_lines(old.as_str(), new.as_str());
        diff.unified_diff().header(&name(before), &name(after)).to_string()
    }

    /// Short text of the change, for a person.
    pub(super) fn text(&self) -> String {
        match self {
            Self::File { path, before: None, .. } => format!("made {}", path.display()),
            Self::File { path, after: None, .. } => format!("removed {}", path.display()),
            Self::File { path, .. } => format!("changed {}", path.display()),
            Self::Link { path, .. } => format!("made the link {}", path.display()),
            Self::Unlink { path, .. } => format!("removed the link {}", path.display()),
        }
    }

    /// Makes the change.
    pub(super) fn apply(&self, host: &Host) -> Result<()> {
        match self {
            Self::File { path, before, after } => {
                if host.read(path)? != *before {
                    return Err(Error::new(format!(
                        "{} has just been changed by another program: try again",
                        path.display()
                    )));
                }
                match after {
                    Some(text) => write(host, path, text),
                    None => remove(host, path),
                }
            }
            Self::Link { path, target } => {
                let place = make_folder_of(host, path)?;
                symlink(target, &place)
                    .explain(|| format!("cannot make the link {}", path.display()))
            }
            Self::Unlink { path, target } => {
                if host.link(path)?.as_deref() != Some(target) {
                    return Ok(());
                }
                remove(host, path)
            }
        }
    }
}

/// Replaces a file by a rename. Mode and owner stay.
fn write(host: &Host, path: &Path, text: &str) -> Result<()> {
    let what = || format!("cannot write {}", path.display());
    let (place, old) = match host.find(path)? {
        // The target of a link is replaced, and not the link.
        Some(place) => {
            let metadata = fs::metadata(&place).explain(what)?;
            (place, Some(metadata))
        }
        None => (make_folder_of(host, path)?, None),
    };
    let folder = place.parent().unwrap_or(Path::new("/"));
    // Engines read files that end in .toml or .conf only.
    let mut new = tempfile::Builder::new().prefix(".isopod-").tempfile_in(folder).explain(what)?;
    new.write_all(text.as_bytes()).explain(what)?;
    let mode = old.as_ref().map_or(NEW_FILE_MODE, Metadata::mode);
    if let Some(old) = &old {
        let (uid, gid) = (Uid::from_raw(old.uid()), Gid::from_raw(old.gid()));
        fchown(new.as_file(), Some(uid), Some(gid)).explain(what)?;
    }
    // After the owner: a change of the owner clears bits of the mode.
    new.as_file().set_permissions(fs::Permissions::from_mode(mode & 0o7777)).explain(what)?;
    new.as_file().sync_all().explain(what)?;
    new.persist(&place).map_err(|e| e.error).explain(what)?;
    sync(folder).explain(what)
}

/// Removes a file or link, and then folders that `install` has made, as long as they are empty.
fn remove(host: &Host, path: &Path) -> Result<()> {
    let what = || format!("cannot remove {}", path.display());
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    let Some(mut folder) = host.find(folder)? else { return Ok(()) };
    fs::remove_file(folder.join(name)).explain(what)?;
    while getxattr(&folder, MADE_MARK, &mut [0_u8; 0][..]).is_ok() {
        match fs::remove_dir(&folder) {
            Err(e) if e.kind() == ErrorKind::DirectoryNotEmpty => break,
            removed => removed.explain(what)?,
        }
        if !folder.pop() {
            break;
        }
    }
    sync(&folder).explain(what)
}

/// Makes the folder of a new file, with those above it. Returns the file's path for this process.
fn make_folder_of(host: &Host, path: &Path) -> Result<PathBuf> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::new(format!("{} is no path of a file", path.display())));
    };
    if let Some(place) = host.find(folder)? {
        return Ok(place.join(name));
    }
    let place = make_folder_of(host, folder)?;
    let what = || format!("cannot make the folder {}", folder.display());
    fs::create_dir(&place).explain(what)?;
    fs::set_permissions(&place, fs::Permissions::from_mode(0o755)).explain(what)?;
    // A file system without such attributes keeps the empty folder.
    if let Err(errno) = setxattr(&place, MADE_MARK, b"1", XattrFlags::empty()) {
        log::debug!("{} is not marked as made: {errno}", folder.display());
    }
    Ok(place.join(name))
}

fn sync(folder: &Path) -> std::io::Result<()> {
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(path: &str, before: Option<&str>, after: Option<&str>) -> Change {
        let text = |text: Option<&str>| text.map(str::to_owned);
        Change::file(path, text(before), text(after)).unwrap()
    }

    #[test]
    fn a_diff_names_the_file_of_the_host() {
        let diff = change("/etc/x", Some("a\nb\n"), Some("a\nb\nc\n")).diff();
        assert_eq!(diff, "--- /etc/x\n+++ /etc/x\n@@ -1,2 +1,3 @@\n a\n b\n+c\n");
        let diff = change("/etc/x", None, Some("a\n")).diff();
        assert!(diff.starts_with("--- /dev/null\n+++ /etc/x\n"), "{diff}");
        assert!(change("/etc/x", Some("a"), None).diff().contains("\n+++ /dev/null\n"));
        assert_eq!(Change::file("/etc/x", None, None), None);
    }

    #[test]
    fn a_file_keeps_mode_and_link() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        fs::create_dir_all(at("etc")).unwrap();
        fs::write(at("etc/real"), "a").unwrap();
        fs::set_permissions(at("etc/real"), fs::Permissions::from_mode(0o640)).unwrap();
        symlink("/etc/real", at("etc/x")).unwrap();
        let host = Host::open(dir.path()).unwrap();
        change("/etc/x", Some("a"), Some("b")).apply(&host).unwrap();
        assert_eq!(fs::read_to_string(at("etc/real")).unwrap(), "b");
        assert_eq!(fs::metadata(at("etc/real")).unwrap().mode() & 0o7777, 0o640);
        assert_eq!(fs::read_link(at("etc/x")).unwrap(), Path::new("/etc/real"));
        assert_eq!(fs::read_dir(at("etc")).unwrap().count(), 2);

        let error = change("/etc/x", Some("a"), Some("c")).apply(&host).unwrap_err();
        assert!(error.message.contains("try again"), "{error}");
    }

    #[test]
    fn new_folders_and_files_can_be_read_by_all() {
        let dir = tempfile::tempdir().unwrap();
        let host = Host::open(dir.path()).unwrap();
        change("/etc/a/b/x", None, Some("b")).apply(&host).unwrap();
        for (path, mode) in [("etc/a/b", 0o755), ("etc/a/b/x", 0o644)] {
            let found = fs::metadata(dir.path().join(path)).unwrap().mode() & 0o7777;
            assert_eq!(found, mode, "{path}");
        }
        change("/etc/a/b/x", Some("b"), None).apply(&host).unwrap();
        assert!(!dir.path().join("etc/a/b/x").exists());
    }
}

//! Results that are costly to make, kept outside the checkout and found again by their content.
//!
//! An entry is a directory `<cache>/<kind>/<key>`, complete or absent: it is made under another name
//! and renamed. One maker at a time works on a key; others wait for it and then use its result.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest as _, Sha256};

use crate::progress::step;

/// `$XDG_CACHE_HOME/isopod`, or `~/.cache/isopod`.
pub(crate) fn root() -> Result<PathBuf> {
    let absolute =
        |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    if let Some(cache) = absolute("XDG_CACHE_HOME") {
        return Ok(cache.join("isopod"));
    }
    match absolute("HOME") {
        Some(home) => Ok(home.join(".cache/isopod")),
        None => bail!("neither XDG_CACHE_HOME nor HOME says where the cache is; set one of them"),
    }
}

/// A key over everything that decides what an entry contains: each part with its name.
pub(crate) fn key<'a>(parts: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> String {
    let mut hash = Sha256::new();
    for (name, content) in parts {
        // With lengths, so that no two lists of parts read the same.
        hash.update((name.len() as u64).to_le_bytes());
        hash.update(name);
        hash.update((content.len() as u64).to_le_bytes());
        hash.update(content);
    }
    hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// A file's content, to be part of a key.
pub(crate) fn part(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The directory of entry `key` of `kind`; `make` fills it when it is not there yet.
///
/// # Errors
///
/// Those of `make`, after which nothing of the entry is left, and of the file system.
pub(crate) fn entry(
    kind: &str,
    key: &str,
    make: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let shelf = root()?.join(kind);
    let path = shelf.join(key);
    if path.is_dir() {
        return Ok(path);
    }
    fs::create_dir_all(&shelf).with_context(|| format!("cannot create {}", shelf.display()))?;
    let _lock = lock(&shelf.join(format!(".{key}.lock")))?;
    if path.is_dir() {
        return Ok(path);
    }
    // Whatever has this name was left by a maker that died: the lock is ours.
    let unfinished = shelf.join(format!(".{key}.unfinished"));
    remove(&unfinished)?;
    sweep(&shelf);
    fs::create_dir(&unfinished)
        .with_context(|| format!("cannot create {}", unfinished.display()))?;
    let made = make(&unfinished).and_then(|()| {
        fs::rename(&unfinished, &path).with_context(|| {
            format!("cannot rename {} to {}", unfinished.display(), path.display())
        })
    });
    if made.is_err() {
        remove(&unfinished)?;
    }
    made.map(|()| path)
}

/// Writes a file of the cache such that it is at any time the old one or the new one, whole.
pub(crate) fn write(path: &Path, content: &[u8]) -> Result<()> {
    let dir = path.parent().unwrap_or(path);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // No other process, and no other thread of this one, writes a file of this name.
    let new = dir.join(format!(".{name}.{}.new", nix::unistd::gettid()));
    fs::create_dir_all(dir)
        .and_then(|()| fs::write(&new, content))
        .and_then(|()| fs::rename(&new, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Notes in the time of an entry, or of a file of the cache, that it was of use. Without, it is forgotten
/// sooner.
pub(crate) fn used(path: &Path) {
    let _ = File::open(path).and_then(|file| file.set_modified(SystemTime::now()));
}

/// Removes entries of `shelf` that have been of no use for longer than `kept`. One that cannot be removed
/// does no harm.
pub(crate) fn forget_unused(shelf: &Path, kept: Duration) {
    for entry in fs::read_dir(shelf).into_iter().flatten().flatten() {
        let used = entry.metadata().and_then(|metadata| metadata.modified());
        let age = used.ok().and_then(|used| used.elapsed().ok()).unwrap_or_default();
        // Locks stay: somebody may wait for one.
        if age > kept && !entry.file_name().as_encoded_bytes().starts_with(b".") {
            let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let _ = if is_dir {
                fs::remove_dir_all(entry.path())
            } else {
                fs::remove_file(entry.path())
            };
        }
    }
}

/// Removes what makers of other entries left when they died: nobody has the lock of its key. One
/// that cannot be removed is in nobody's way.
fn sweep(shelf: &Path) {
    let Ok(entries) = fs::read_dir(shelf) else { return };
    for entry in entries.filter_map(Result::ok) {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(key) = name.strip_suffix(".unfinished") else { continue };
        let lock = File::open(shelf.join(format!("{key}.lock")))
            .map(|file| Flock::lock(file, FlockArg::LockExclusiveNonblock));
        if let Ok(Ok(_lock)) = lock {
            let _ = remove(&entry.path());
        }
    }
}

/// Takes the exclusive lock that `path` stands for, after the process that has it.
pub(crate) fn lock(path: &Path) -> Result<Flock<File>> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| format!("cannot open the lock {}", path.display()))?;
    let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(held) => return Ok(held),
        Err((file, nix::errno::Errno::EWOULDBLOCK)) => file,
        Err((_, error)) => {
            return Err(error).with_context(|| format!("cannot lock {}", path.display()));
        }
    };
    step(&format!("wait for another process that holds {}", path.display()), || {
        Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, error)| error)
            .with_context(|| format!("cannot lock {}", path.display()))
    })
}

/// Removes a directory with all in it, if it is there.
fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_dead_makers_left_is_swept_up() {
        let name = format!("xtask-cache-{}", std::process::id());
        let shelf = std::env::temp_dir().join(name);
        for dir in [".dead.unfinished", ".busy.unfinished", "done"] {
            fs::create_dir_all(shelf.join(dir).join("work")).unwrap();
        }
        drop(lock(&shelf.join(".dead.lock")).unwrap());
        let _busy = lock(&shelf.join(".busy.lock")).unwrap();
        sweep(&shelf);
        let left = |name: &str| shelf.join(name).exists();
        assert!(!left(".dead.unfinished") && left(".busy.unfinished") && left("done"));
        remove(&shelf).unwrap();
    }

    #[test]
    fn key_depends_on_the_borders_of_parts() {
        let one = key([("a", b"bc".as_slice())]);
        assert_eq!(one.len(), 32);
        assert_ne!(one, key([("ab", b"c".as_slice())]));
        assert_ne!(one, key([("a", b"b".as_slice()), ("", b"c".as_slice())]));
        assert_eq!(one, key([("a", b"bc".as_slice())]));
    }
}

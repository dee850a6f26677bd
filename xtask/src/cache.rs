//! The cache: costly results, kept outside the checkout under a hash of their inputs.
//!
//! An entry is a directory `<cache>/<kind>/<key>`. It is made under another name and then renamed,
//! so it is complete or absent. A lock allows one maker per key; other processes wait for the lock
//! and use the result.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest as _, Sha256};

use crate::progress::{short_step, step};

/// `$XDG_CACHE_HOME/isopod`, or `~/.cache/isopod`.
pub(crate) fn root() -> Result<PathBuf> {
    let absolute =
        |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    if let Some(cache) = absolute("XDG_CACHE_HOME") {
        return Ok(cache.join("isopod"));
    }
    match absolute("HOME") {
        Some(home) => Ok(home.join(".cache/isopod")),
        None => bail!("neither XDG_CACHE_HOME nor HOME is an absolute path; set one of them"),
    }
}

/// Key of an entry: a hash over the named inputs that decide its content.
pub(crate) fn key<'a>(parts: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> String {
    let mut hash = Sha256::new();
    for (name, content) in parts {
        // The lengths keep apart lists whose concatenation is the same.
        hash.update((name.len() as u64).to_le_bytes());
        hash.update(name);
        hash.update((content.len() as u64).to_le_bytes());
        hash.update(content);
    }
    hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// Content of a file, as an input of [`key`].
pub(crate) fn part(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The directory of entry `key` of `kind`. A missing entry is filled by `make`.
///
/// If `make` fails, nothing of the entry is left.
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
    // This process has the lock, so an existing directory is from a maker that died.
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

/// Replaces a file of the cache atomically.
pub(crate) fn write(path: &Path, content: &[u8]) -> Result<()> {
    let dir = path.parent().unwrap_or(path);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // The thread id makes the name unique among all writers.
    let new = dir.join(format!(".{name}.{}.new", nix::unistd::gettid()));
    fs::create_dir_all(dir)
        .and_then(|()| fs::write(&new, content))
        .and_then(|()| fs::rename(&new, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Sets the modification time of an entry or a file of the cache to now.
///
/// [`forget_unused`] goes by that time.
pub(crate) fn used(path: &Path) {
    let _ = File::open(path).and_then(|file| file.set_modified(SystemTime::now()));
}

/// Removes entries of `shelf` whose modification time is older than `kept`. Failures are ignored.
pub(crate) fn forget_unused(shelf: &Path, kept: Duration) {
    for entry in fs::read_dir(shelf).into_iter().flatten().flatten() {
        let used = entry.metadata().and_then(|metadata| metadata.modified());
        let age = used.ok().and_then(|used| used.elapsed().ok()).unwrap_or_default();
        // Names with a dot in front are locks; another process may wait for one.
        if age > kept && !entry.file_name().as_encoded_bytes().starts_with(b".") {
            let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if is_dir {
                let _ = remove(&entry.path());
            } else {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// Removes unfinished entries of makers that died: the lock of their key is free.
///
/// Failures are ignored: an unfinished entry never counts as an entry.
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

/// Takes the exclusive lock on the file `path`, and waits for its present holder.
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

/// Removes a directory and its contents, if it exists.
fn remove(path: &Path) -> Result<()> {
    let removed = short_step(&format!("remove {}", path.display()), || fs::remove_dir_all(path));
    match removed {
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

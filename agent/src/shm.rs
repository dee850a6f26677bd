//! Shared memory for the containers of a pod.
//!
//! Each directory of shared memory on the host has a tmpfs here. All containers with a mount of the
//! directory bind the same tmpfs.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use isopod_protocol::SHM_DIR;
use isopod_protocol::agent::{SharedMemory, VolumeContent};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::error::{Context as _, Error, Result};
use crate::volume;

/// Most bytes of a key, which becomes the name of a directory.
const MAX_KEY: usize = 64;

/// Ids of the containers that use each shared memory, by its key.
#[derive(Debug, Default)]
pub(crate) struct SharedMemories(Mutex<HashMap<String, HashSet<String>>>);

impl SharedMemories {
    /// Makes the missing shared memories of a container. Returns the keys of those. Blocks.
    ///
    /// After an error the container keeps those made so far, until [`Self::leave`].
    pub(crate) fn join(&self, container_id: &str, wanted: &[SharedMemory]) -> Result<Vec<String>> {
        let mut made = Vec::new();
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for memory in wanted {
            let path = path_of(&memory.key)?;
            let users = all.entry(memory.key.clone()).or_default();
            if users.is_empty() {
                make(&path, memory)?;
                made.push(memory.key.clone());
            }
            users.insert(container_id.to_owned());
        }
        Ok(made)
    }

    /// Replaces the files of a shared memory that a container has. Blocks, and only one call works
    /// at a time.
    pub(crate) fn write(&self, content: &VolumeContent) -> Result<()> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let path = path_of(&content.key)?;
        if !all.contains_key(&content.key) {
            return Err(Error::state(format!("no container has the volume {}", content.key)));
        }
        volume::replace(&path, &content.files)
    }

    /// Removes the shared memories that only this container has. A process that still uses one
    /// keeps its contents alive. Blocks.
    pub(crate) fn leave(&self, container_id: &str) -> Result<()> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (key, users) in all.iter_mut() {
            if users.remove(container_id) && users.is_empty() {
                let path = path_of(key)?;
                let what = || format!("remove {}", path.display());
                unmount(&path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).context(what)?;
                fs::remove_dir(&path).context(what)?;
            }
        }
        all.retain(|_, users| !users.is_empty());
        Ok(())
    }
}

fn path_of(key: &str) -> Result<PathBuf> {
    let usable = (1..=MAX_KEY).contains(&key.len())
        && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if !usable {
        return Err(Error::invalid("shared_memory.key", format!("{key:?} is not a valid key")));
    }
    Ok(Path::new(SHM_DIR).join(key))
}

fn make(path: &Path, memory: &SharedMemory) -> Result<()> {
    let what = || format!("make the shared memory {}", path.display());
    let SharedMemory { size, mode, uid, gid, .. } = memory;
    let options = format!("size={size},mode={:o},uid={uid},gid={gid}", mode & 0o7777);
    let options = std::ffi::CString::new(options).context(what)?;
    fs::create_dir_all(path).context(what)?;
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    if !memory.executable {
        flags |= MountFlags::NOEXEC;
    }
    mount("shm", path, "tmpfs", flags, options.as_c_str()).context(what)
}

#[cfg(test)]
mod tests {
    use super::path_of;

    #[test]
    fn keys_become_names() {
        assert!(path_of("0-1a-2F").is_ok());
        for key in ["", "a/b", "..", ".", "a b", &"x".repeat(65)] {
            assert!(path_of(key).is_err(), "{key:?}");
        }
    }
}

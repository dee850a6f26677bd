//! Unix sockets of the host as sources of bind mounts, as far as the operator shares them.

use std::{
    fs::{self, Metadata},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use isopod_protocol::HOST_SOCKET_TOKEN_LEN;
use serde::{Deserialize, Serialize};

use super::id_map::{self, IdMap};
use crate::{
    error::{Error, Result},
    random::fill,
    settings,
};

/// A socket of the host that a container mounts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostSocket {
    /// Position in `mounts` of config.json.
    pub mount: u32,
    /// Path on the host, absolute and without symbolic links.
    pub path: PathBuf,
    /// Secret of the guest's agent, by which it names the socket.
    pub token: [u8; HOST_SOCKET_TOKEN_LEN],
    /// Permissions of the socket.
    pub mode: u32,
    /// Owner of the socket.
    pub uid: u32,
    /// Group of the socket.
    pub gid: u32,
}

impl HostSocket {
    /// A socket that everybody in the container may use.
    #[cfg(test)]
    pub(crate) fn new(mount: u32, path: PathBuf, token: [u8; HOST_SOCKET_TOKEN_LEN]) -> Self {
        Self { mount, path, token, mode: 0o666, uid: 0, gid: 0 }
    }

    /// The socket at `path`, whose metadata is `found`, for the mount at position `mount`. With an
    /// id mapping it has the owner that the mapping gives to it.
    pub(super) fn of(
        mount: usize,
        path: &Path,
        found: &Metadata,
        map: Option<&IdMap>,
    ) -> Result<Self> {
        let mut token = [0; HOST_SOCKET_TOKEN_LEN];
        fill(&mut token)?;
        let mount =
            u32::try_from(mount).map_err(|_| Error::new("config.json has too many mounts"))?;
        let mode = found.mode() & 0o7777;
        let (uid, gid) = id_map::owner(map, found);
        Ok(Self { mount, path: path.to_owned(), token, mode, uid, gid })
    }
}

/// Tells whether the operator shares a socket. `path` is absolute and without symbolic links.
pub(super) fn is_listed(path: &Path) -> Result<bool> {
    Ok(settings::host_sockets()?.iter().any(|listed| matches(listed, path)))
}

/// Tells whether `listed` means the socket at `path`. Symbolic links of the operator are followed.
/// Those in a mount's source have been followed: one in a listed directory leads out of it.
fn matches(listed: &Path, path: &Path) -> bool {
    let found = |listed: &Path| fs::canonicalize(listed).ok();
    match (listed.parent(), listed.file_name()) {
        (Some(directory), Some(name)) if name == "*" => {
            found(directory).is_some_and(|directory| path.parent() == Some(&directory))
        }
        _ => found(listed).is_some_and(|listed| listed == path),
    }
}

#[cfg(test)]
mod tests {
    use super::matches;
    use std::{fs, os::unix::fs::symlink};

    #[test]
    fn a_list_means_its_own_sockets_and_no_others() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        fs::create_dir_all(root.join("real/sub")).unwrap();
        symlink("real", root.join("link")).unwrap();
        for name in ["real/one", "real/two", "real/sub/three", "outside"] {
            fs::write(root.join(name), "").unwrap();
        }
        for (listed, path, expected) in [
            ("real/one", "real/one", true),
            ("link/one", "real/one", true),
            ("real/one", "real/two", false),
            ("real/*", "real/two", true),
            ("link/*", "real/two", true),
            ("real/*", "real/sub/three", false),
            ("real/*", "outside", false),
            ("missing", "outside", false),
        ] {
            assert_eq!(matches(&root.join(listed), &root.join(path)), expected, "{listed} {path}");
        }
    }
}

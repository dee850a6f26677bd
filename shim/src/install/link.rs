//! The link by which containerd and CRI-O find the shim.

use std::path::{Path, PathBuf};

use super::{
    change::Change,
    host::{Host, PROGRAM_FOLDERS},
    registration::{Registration, SHIM},
};
use crate::error::{Error, Result};

/// End of the targets of links that `install` makes. Others, such as those of `cargo xtask
/// install`, have no dot.
const OWN_TARGET: &str = "./isopod";

/// Changes that make the link, if there is none yet.
///
/// # Errors
///
/// A shim of another installation would be found.
pub(super) fn install(host: &Host, registration: &Registration) -> Result<Vec<Change>> {
    let program = Path::new(&registration.program);
    let wanted = target(registration);
    let path = registration.shim();
    let mut changes = Vec::new();
    for folder in PROGRAM_FOLDERS {
        let found = Path::new(folder).join(SHIM);
        if let Some(old) = host.link(&found)?.filter(|old| is_own(old)) {
            if found == path && old == wanted {
                return Ok(changes);
            }
            changes.push(Change::Unlink { path: found, target: old });
            continue;
        }
        let Some(place) = host.find(&found)? else { continue };
        // Another installation may have containers on it, so it is not replaced.
        if Some(place) != host.find(program)? {
            return Err(Error::new(format!(
                "{} belongs to another isopod than {}: remove one of the two",
                found.display(),
                registration.program
            )));
        }
        if found == path {
            return Ok(changes);
        }
    }
    changes.push(Change::Link { path, target: wanted });
    Ok(changes)
}

/// The removal of the link, if `install` has made it.
pub(super) fn uninstall(host: &Host, registration: &Registration) -> Result<Vec<Change>> {
    let path = registration.shim();
    let target = host.link(&path)?.filter(|target| is_own(target));
    Ok(target.map(|target| Change::Unlink { path, target }).into_iter().collect())
}

/// Target of the link. It is relative within a folder, so that an installation can be moved.
fn target(registration: &Registration) -> PathBuf {
    let folder = Path::new(&registration.program).parent().unwrap_or(Path::new("/"));
    if registration.shim().parent() == Some(folder) {
        return PathBuf::from(OWN_TARGET);
    }
    let mut target = folder.as_os_str().to_owned();
    target.push("/");
    target.push(OWN_TARGET);
    target.into()
}

fn is_own(target: &Path) -> bool {
    // A comparison of paths would drop the dot.
    let target = target.as_os_str().as_encoded_bytes();
    let folder = target.strip_suffix(OWN_TARGET.as_bytes());
    folder.is_some_and(|folder| folder.is_empty() || folder.ends_with(b"/"))
}

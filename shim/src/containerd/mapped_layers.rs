//! Root file systems whose owners are mapped: the mount options `uidmap` and `gidmap` of containerd
//! 2.x, for pods with a user namespace.
//!
//! The kernel maps the ids of a mount, and not those of an overlay. So the layers of an overlay are
//! covered by id-mapped mounts of themselves while the overlay is made, which keeps them.

use std::{
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use rustix::{
    fs::CWD,
    mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount},
};

use crate::{
    bundle::IdMap,
    error::{Error, Explain, Result},
    microvm::share,
};

/// Takes the options `uidmap` and `gidmap` out of `options`. `None` if there is neither.
///
/// # Errors
///
/// If one is there without the other, or is not `CONTAINER-ID:HOST-ID:SIZE[,...]`.
pub(super) fn take_map(options: &mut Vec<String>) -> Result<Option<IdMap>> {
    let mut take = |name: &str| -> Result<Option<String>> {
        let position = options
            .iter()
            .position(|option| option.strip_prefix(name).is_some_and(|rest| rest.starts_with('=')));
        position.map(|position| lines(&options.remove(position))).transpose()
    };
    match (take("uidmap")?, take("gidmap")?) {
        (None, None) => Ok(None),
        (Some(uids), Some(gids)) => Ok(Some(IdMap { uids, gids, recursive: false })),
        _ => Err(Error::new("the mount options uidmap and gidmap need each other")),
    }
}

/// The value of an option as lines of `/proc/PID/uid_map`.
fn lines(option: &str) -> Result<String> {
    let (_, value) = option.split_once('=').unwrap_or_default();
    let mut lines = String::new();
    for mapping in value.split(',') {
        let fields: Vec<&str> = mapping.split(':').collect();
        if fields.len() != 3 || fields.iter().any(|field| field.parse::<u32>().is_err()) {
            return Err(Error::new(format!(
                "the mount option {option:?} is not of the form CONTAINER-ID:HOST-ID:SIZE[,...]"
            )));
        }
        lines.push_str(&fields.join(" "));
        lines.push('\n');
    }
    Ok(lines)
}

/// The lower layers of an overlay's options.
pub(super) fn layers(options: &[String]) -> Vec<PathBuf> {
    let lower = options.iter().find_map(|option| option.strip_prefix("lowerdir="));
    lower.into_iter().flat_map(|lower| lower.split(':')).map(PathBuf::from).collect()
}

/// Id-mapped mounts over directories. Dropping this removes them.
#[derive(Debug)]
pub(super) struct MappedLayers(Vec<PathBuf>);

impl MappedLayers {
    /// Covers each directory by an id-mapped mount of itself, in the mount namespace of the calling
    /// thread.
    ///
    /// # Errors
    ///
    /// If the kernel has no id-mapped mounts for the file system.
    pub(super) fn new(directories: &[PathBuf], map: &IdMap) -> Result<Self> {
        let mut mapped = Self(Vec::new());
        for directory in directories {
            cover(directory, map)?;
            mapped.0.push(directory.clone());
        }
        Ok(mapped)
    }
}

impl Drop for MappedLayers {
    fn drop(&mut self) {
        for directory in self.0.iter().rev() {
            // The overlay has its own copy of the mount.
            if let Err(e) = unmount(directory, UnmountFlags::DETACH) {
                log::warn!("cannot unmount {}: {e}", directory.display());
            }
        }
    }
}

/// Mounts `directory` over itself, with other owners.
pub(super) fn cover(directory: &Path, map: &IdMap) -> Result<()> {
    let what = || format!("cannot map the owners of {}", directory.display());
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, directory, flags).explain(what)?;
    share::map_ids(tree.as_fd(), map, directory)?;
    move_mount(&tree, "", CWD, directory, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).explain(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(options: &[&str]) -> (Result<Option<IdMap>>, Vec<String>) {
        let mut options = options.iter().map(|option| (*option).to_owned()).collect();
        (take_map(&mut options), options)
    }

    #[test]
    fn mappings_are_taken_out_of_the_options() {
        let (map, rest) =
            taken(&["uidmap=0:100000:65536,70000:5:1", "ro", "gidmap=0:7:1", "lowerdir=/a:/b"]);
        let map = map.unwrap().unwrap();
        assert_eq!(map.uids, "0 100000 65536\n70000 5 1\n");
        assert_eq!((map.gids.as_str(), map.recursive), ("0 7 1\n", false));
        assert_eq!(rest, ["ro", "lowerdir=/a:/b"]);
        assert_eq!(layers(&rest), [Path::new("/a"), Path::new("/b")]);
        assert_eq!(taken(&["ro"]).0.unwrap(), None);
    }

    #[test]
    fn half_a_mapping_is_refused_by_name() {
        for (options, words) in [
            (&["uidmap=0:1:1"][..], "need each other"),
            (&["uidmap=0:1", "gidmap=0:1:1"], "uidmap=0:1"),
            (&["uidmap=0:1:1", "gidmap=a:1:1"], "gidmap=a:1:1"),
            (&["uidmap=0:1:1,", "gidmap=0:1:1"], "CONTAINER-ID"),
        ] {
            let error = taken(options).0.unwrap_err();
            assert!(error.message.contains(words), "{error}");
        }
    }
}

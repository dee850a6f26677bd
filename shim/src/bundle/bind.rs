//! Bind mounts of config.json.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{id_map::IdMap, propagation::Propagation, shm::Shm};

/// A bind mount's host side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// Position in `mounts` of config.json.
    pub mount: usize,
    /// The source: an absolute path on the host.
    pub source: PathBuf,
    /// `source` is a directory, not a file.
    pub directory: bool,
    /// Mounts below the source are bound too (`rbind`).
    pub recursive: bool,
    /// The guest may only read.
    pub read_only: bool,
    /// Propagation of the host's later mounts below the source.
    pub propagation: Propagation,
    /// The id mapping of an id-mapped mount.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id_map: Option<IdMap>,
    /// The guest's tmpfs in place of the source, for shared memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shm: Option<Shm>,
}

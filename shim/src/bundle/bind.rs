//! Bind mounts of config.json.

use std::{
    fs,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{Mount, Spec};
use serde::{Deserialize, Serialize};

use super::{
    host_socket::{self, HostSocket},
    id_map::IdMap,
    projected::{self, Copies, Projected},
    propagation::Propagation,
    shm::{self, Shm},
};
use crate::error::{Error, Explain, Result};

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
    /// The guest's tmpfs has a copy of this volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub projected: Option<Projected>,
    /// The source is a unix socket that the agent stands for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<HostSocket>,
}

impl Bind {
    /// Tells whether the guest has something of its own in place of the source.
    pub fn is_of_the_guest(&self) -> bool {
        self.shm.is_some() || self.socket.is_some()
    }
}

/// Finds the sources of the bind mounts and checks that the guest can be given them.
pub(super) fn binds(bundle: &Path, spec: &Spec) -> Result<Vec<Bind>> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let binds = mounts.iter().enumerate().filter(|(_, mount)| is_bind(mount));
    let mut copies = Copies::default();
    binds.map(|(index, mount)| bind(bundle, spec, index, mount, &mut copies)).collect()
}

fn bind(
    bundle: &Path,
    spec: &Spec,
    index: usize,
    mount: &Mount,
    copies: &mut Copies,
) -> Result<Bind> {
    let name = format!("mounts[{index}] ({})", mount.destination().display());
    let source = mount
        .source()
        .as_ref()
        .filter(|source| !source.as_os_str().is_empty())
        .ok_or_else(|| Error::new(format!("{name} is a bind mount without a source")))?;
    let source = bundle.join(source);
    let source = fs::canonicalize(&source)
        .explain(|| format!("{name}: cannot find its source {}", source.display()))?;
    let what = || format!("{name}: cannot read its source {}", source.display());
    let found = fs::metadata(&source).explain(what)?;
    let kind = found.file_type();
    let special = if kind.is_block_device() || kind.is_char_device() {
        Some("a device: list it under linux.devices")
    } else if kind.is_socket() && !host_socket::is_listed(&source)? {
        Some(
            "a socket that the host does not share: an administrator can list it under \
             host_sockets in /etc/isopod/config.toml",
        )
    } else if kind.is_fifo() {
        Some("a named pipe, which cannot connect a microVM with the host")
    } else {
        None
    };
    if let Some(special) = special {
        return Err(Error::new(format!("{name}: its source {} is {special}", source.display())));
    }
    let id_map = IdMap::of(&name, mount, true, spec)?;
    let map = id_map.as_ref();
    let socket = match kind.is_socket() {
        true => Some(HostSocket::of(index, &source, &found, map)?),
        false => None,
    };
    let read_only = has_option(mount, "ro") || has_option(mount, "rro");
    let projected = match read_only {
        true => copies.of(&source, &found),
        false => None,
    };
    let shm = Shm::of(mount.destination(), &source, &found, map).explain(what)?;
    let shm = shm.or_else(|| projected.as_ref().map(|_| projected::shm(&found, map)));
    if let Some(whole) = shm::part_of_memory(&source).explain(what)? {
        return Err(Error::new(format!(
            "{name}: its source {} is a part (subPath) of the emptyDir {}, whose medium is Memory: \
             such a volume is in the guest's memory and can be mounted as a whole only",
            source.display(),
            whole.display()
        )));
    }
    Ok(Bind {
        mount: index,
        source,
        directory: kind.is_dir(),
        recursive: has_option(mount, "rbind"),
        read_only,
        propagation: Propagation::of_bind(spec, mount),
        id_map,
        shm,
        projected,
        socket,
    })
}

/// Tells whether a mount is a bind mount, by its type or its options.
pub(super) fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || has_option(mount, "bind")
        || has_option(mount, "rbind")
}

/// Tells whether a mount has an option. The last of two opposite options wins, as with mount(8):
/// "rw" takes back "ro".
pub(super) fn has_option(mount: &Mount, option: &str) -> bool {
    let opposite = match option {
        "ro" | "rro" => "rw",
        _ => "",
    };
    let options = mount.options().as_deref().unwrap_or_default();
    let last = options.iter().rev().find(|o| *o == option || *o == opposite);
    last.is_some_and(|found| found == option)
}

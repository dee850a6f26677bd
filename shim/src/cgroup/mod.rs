//! The host's cgroup of a sandbox: where `docker stats`, `podman stats` and the host's administrator
//! find what a microVM uses.
//!
//! The sandbox process enters it before it starts the VMM, so all of the microVM's memory and time is
//! charged there. Limits on processor time hold there too, with an allowance: see [`cpu`]. No other
//! limit of the container's does: those hold inside the guest, where they count the container alone, and
//! the size of the microVM bounds the memory from outside. Controllers are switched on for it, and
//! whoever manages the host may set limits in it or above.
//!
//! Only cgroups v2 are used. On hosts with v1 hierarchies a sandbox stays in its caller's cgroups.

mod cpu;
mod fs;
mod systemd;

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

pub(crate) use self::{cpu::CpuLimits, fs::own_path};
pub use self::{fs::Cgroup, systemd::Unit};
use crate::{
    error::{Error, Result},
    state::Id,
};

/// Where cgroups are mounted.
const MOUNT_POINT: &str = "/sys/fs/cgroup";

/// Where a sandbox belongs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Its directory.
    dir: PathBuf,
    /// config.json names it. If not, a sandbox can do without.
    asked: bool,
    /// Who makes it, if that is systemd.
    unit: Option<Unit>,
    /// The cgroup of the command that creates the container.
    caller: PathBuf,
}

impl Place {
    /// Reads `linux.cgroupsPath` as runc does. With `--systemd-cgroup` it is `slice:prefix:name`,
    /// without it a path: absolute, or relative to the parent of the caller's cgroup. Without either
    /// the place is that of runc's default. None on a host without cgroups v2.
    ///
    /// # Errors
    ///
    /// If it is neither of these.
    pub fn find(path: Option<&Path>, systemd: bool, id: &Id) -> Result<Option<Self>> {
        let path = path.filter(|path| !path.as_os_str().is_empty());
        let asked = path.is_some();
        let text = path.map(|path| path.to_string_lossy());
        let unit = if systemd { Some(Unit::parse(text.as_deref(), id)?) } else { None };
        let Some(caller) = own_path() else {
            if asked {
                log::debug!("linux.cgroupsPath has no effect: this host has no cgroups v2");
            }
            return Ok(None);
        };
        let below = match (&unit, path) {
            (Some(unit), _) => unit.path(),
            (None, Some(path)) if path.is_absolute() => clean(path),
            (None, relative) => {
                let own = caller.strip_prefix(MOUNT_POINT).unwrap_or(Path::new(""));
                let parent = own.parent().unwrap_or(Path::new(""));
                parent.join(clean(relative.unwrap_or(Path::new(id.as_str()))))
            }
        };
        if below.as_os_str().is_empty() {
            return Err(Error::new("linux.cgroupsPath names the root of all cgroups"));
        }
        let unit = unit.filter(|unit| {
            let running = systemd::is_running();
            if !running {
                log::debug!("systemd does not run here, so {} is made without it", unit.name());
            }
            running
        });
        let dir = Path::new(MOUNT_POINT).join(below);
        Ok(Some(Self { dir, asked, unit, caller }))
    }

    /// The unit of systemd that is to be started for it.
    pub fn unit(&self) -> Option<&Unit> {
        self.unit.as_ref()
    }

    /// The cgroup of the command that creates the container.
    pub fn caller(&self) -> &Path {
        &self.caller
    }

    /// config.json names it.
    pub fn is_asked_for(&self) -> bool {
        self.asked
    }

    /// What is to be made, and to be removed at the end, whatever comes of it. For the sandbox process: a
    /// scope has been made by now, with this process in it.
    ///
    /// # Errors
    ///
    /// If this process is not in the scope that systemd was asked for.
    pub(crate) fn plan(&self) -> Result<Cgroup> {
        let Some(unit) = &self.unit else { return Ok(Cgroup::plan(&self.dir, None)) };
        // systemd escapes what its names cannot hold, so the path is known to it alone.
        let dir = own_path().filter(|dir| *dir != self.caller).ok_or_else(|| {
            Error::new(format!("systemd has not put the sandbox process into {}", unit.name()))
        })?;
        Ok(Cgroup::plan(&dir, Some(unit)))
    }
}

/// A path without `.` and `..`, which do not lead out of the root, and relative to that.
fn clean(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => cleaned.push(name),
            Component::ParentDir => drop(cleaned.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    cleaned
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_path_leads_out_of_the_root() {
        for (path, cleaned) in [
            ("/docker/web", "docker/web"),
            ("a/./b//c/", "a/b/c"),
            ("/../../etc", "etc"),
            ("../../../x/../y", "y"),
            ("/", ""),
        ] {
            assert_eq!(clean(Path::new(path)), Path::new(cleaned), "{path}");
        }
    }
}

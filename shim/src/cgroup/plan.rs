//! The place of a sandbox among the cgroups of the host.

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{
    fs::{Cgroup, MOUNT_POINT, own_path},
    systemd::{self, Held, Unit},
};
use crate::{
    container_id::ContainerId,
    error::{Error, Result},
};

/// The place of a sandbox among the cgroups of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupPlan {
    /// Directory of the cgroup.
    dir: PathBuf,
    /// config.json names the cgroup. Otherwise a sandbox can do without it.
    asked: bool,
    /// The scope, if systemd makes the cgroup.
    unit: Option<Unit>,
    /// The cgroup of the command that creates the container.
    caller: PathBuf,
}

impl CgroupPlan {
    /// Reads `linux.cgroupsPath` as runc does. With `--systemd-cgroup` the value is
    /// `slice:prefix:name`, and without it a path: absolute, or relative to the parent of the
    /// caller's cgroup. Without a value the place is runc's default. None on a host without cgroups
    /// v2.
    pub fn find(path: Option<&Path>, systemd: bool, id: &ContainerId) -> Result<Option<Self>> {
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

    /// The systemd unit to start for the sandbox.
    pub fn unit(&self) -> Option<&Unit> {
        self.unit.as_ref()
    }

    /// Moves this process back to the caller's cgroup.
    pub(crate) fn leave(&self) {
        super::fs::leave_for(&self.caller);
    }

    /// The cgroup of the command that creates the container.
    pub fn caller(&self) -> &Path {
        &self.caller
    }

    /// Tells whether config.json names the cgroup.
    pub fn is_asked_for(&self) -> bool {
        self.asked
    }

    /// The cgroup to make, and to remove at the end in any case. For the sandbox process: systemd
    /// has made the scope by now, with this process in it. If this process is not in the scope,
    /// that is an error.
    pub(crate) fn plan(&self) -> Result<Cgroup> {
        let Some(unit) = &self.unit else { return Ok(Cgroup::plan(&self.dir, None)) };
        // systemd escapes characters that its names cannot hold, so only systemd knows the path.
        let dir = own_path().filter(|dir| *dir != self.caller).ok_or_else(|| {
            Error::new(format!("systemd has not put the sandbox process into {}", unit.name()))
        })?;
        Ok(Cgroup::plan(&dir, Some(unit)))
    }

    /// Like [`Self::plan`], for a process that stays where it is. What it starts is to go there
    /// before the second value is dropped: systemd ends an empty scope.
    pub(crate) fn plan_for_others(&self) -> Result<(Cgroup, Option<Held>)> {
        let Some(unit) = &self.unit else { return Ok((Cgroup::plan(&self.dir, None), None)) };
        let held = unit.hold()?;
        let path = held.path().ok_or_else(|| {
            Error::new(format!("systemd has not made the cgroup of {}", unit.name()))
        })?;
        Ok((Cgroup::plan(&Path::new(MOUNT_POINT).join(path), Some(unit)), Some(held)))
    }

    /// Tells whether a value of `linux.cgroupsPath` is systemd's form, `slice:prefix:name`.
    pub(crate) fn is_systemds(path: Option<&Path>) -> bool {
        let text = path.map(Path::to_string_lossy).unwrap_or_default();
        !text.starts_with('/') && text.split(':').count() == 3
    }
}

/// A path without `.` and `..`, relative to the root. A `..` does not lead out of the root.
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
    fn the_forms_of_a_path_are_told_apart() {
        let is = |text: &str| CgroupPlan::is_systemds(Some(Path::new(text)));
        assert!(is("kubepods-pod1.slice:cri-containerd:web") && is(":docker:web"));
        assert!(!is("/kubepods/pod1/web") && !is("/a:b:c") && !is("a:b"));
        assert!(!CgroupPlan::is_systemds(None));
    }

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

//! The root file system of a task: mounts that containerd asks for, at `rootfs` in the bundle.
//!
//! They are made in the pod's mount namespace only. So the host's mount table is never touched, and
//! they end with the shim, in whatever way that ends.

use std::{
    ffi::CString,
    fs,
    path::{Path, PathBuf},
    thread,
};

use containerd_shim_protos::api::Mount;
use rustix::{
    mount::{MountFlags, mount as mount_at, mount_remount},
    thread::{UnshareFlags, unshare_unsafe},
};

use crate::{
    containerd::mapped_layers::{self, MappedLayers},
    error::{Error, Explain, Result},
};

/// Directory of the root file system in the bundle.
pub(super) const NAME: &str = "rootfs";

/// Longest text of options that mount(2) takes: a page, with the zero at its end.
const MAX_OPTIONS: usize = 4095;

/// Options that are flags of mount(2), and whether they set them.
const FLAGS: [(&str, MountFlags, bool); 23] = [
    ("ro", MountFlags::RDONLY, true),
    ("rw", MountFlags::RDONLY, false),
    ("nosuid", MountFlags::NOSUID, true),
    ("suid", MountFlags::NOSUID, false),
    ("nodev", MountFlags::NODEV, true),
    ("dev", MountFlags::NODEV, false),
    ("noexec", MountFlags::NOEXEC, true),
    ("exec", MountFlags::NOEXEC, false),
    ("noatime", MountFlags::NOATIME, true),
    ("atime", MountFlags::NOATIME, false),
    ("nodiratime", MountFlags::NODIRATIME, true),
    ("diratime", MountFlags::NODIRATIME, false),
    ("relatime", MountFlags::RELATIME, true),
    ("norelatime", MountFlags::RELATIME, false),
    ("strictatime", MountFlags::STRICTATIME, true),
    ("nostrictatime", MountFlags::STRICTATIME, false),
    ("sync", MountFlags::SYNCHRONOUS, true),
    ("async", MountFlags::SYNCHRONOUS, false),
    ("dirsync", MountFlags::DIRSYNC, true),
    ("mand", MountFlags::PERMIT_MANDATORY_FILE_LOCKING, true),
    ("nomand", MountFlags::PERMIT_MANDATORY_FILE_LOCKING, false),
    ("bind", MountFlags::BIND, true),
    ("defaults", MountFlags::empty(), true),
];

/// Type of a mount whose layers have their ids mapped, and not the mount itself.
const OVERLAY: &str = "overlay";

/// Options for which containerd does more than to mount.
const REFUSED: [&str; 1] = ["loop"];

/// Makes the mounts at `rootfs` in the bundle, in the order of the list. The calling thread has a
/// mount namespace of its own, and they end with it. Without mounts, config.json names a directory
/// that is there.
///
/// # Errors
///
/// If a mount fails.
pub(super) fn mount(mounts: &[Mount], bundle: &Path) -> Result<()> {
    let target = bundle.join(NAME);
    if !mounts.is_empty() {
        fs::create_dir_all(&target).explain(|| format!("cannot make {}", target.display()))?;
    }
    mounts.iter().try_for_each(|one| match one.target.as_str() {
        "" | "/" => mount_one(one, &target),
        below => mount_one(one, &target.join(below.trim_start_matches('/'))),
    })
}

fn cannot_mount(one: &Mount, target: &Path) -> String {
    format!("cannot mount {} ({}) at {}", one.source, one.type_, target.display())
}

fn mount_one(one: &Mount, target: &Path) -> Result<()> {
    let what = || cannot_mount(one, target);
    let unsupported =
        |option: &&String| REFUSED.iter().any(|name| option.split('=').next() == Some(name));
    if let Some(option) = one.options.iter().find(unsupported) {
        return Err(Error::new(format!(
            "{}: the option {option} is not supported; use the snapshotter overlayfs or native",
            what()
        )));
    }
    let mut options = one.options.clone();
    let map = mapped_layers::take_map(&mut options).explain(what)?;
    match &map {
        None => mount_plainly(one, &options, target),
        Some(map) if one.type_ == OVERLAY => {
            let _covers = MappedLayers::new(&mapped_layers::layers(&options), map)?;
            mount_plainly(one, &options, target)
        }
        Some(map) => {
            mount_plainly(one, &options, target)?;
            mapped_layers::cover(target, map)
        }
    }
}

/// Mounts with `options`, which have no mapping of ids.
fn mount_plainly(one: &Mount, options: &[String], target: &Path) -> Result<()> {
    let what = || cannot_mount(one, target);
    let (flags, recursive, data) = split(options);
    if flags.contains(MountFlags::BIND) || one.type_ == "bind" {
        let mut bind = MountFlags::BIND;
        if recursive {
            bind |= MountFlags::REC;
        }
        mount_at(&one.source, target, "", bind, None).explain(what)?;
        let rest = flags - MountFlags::BIND;
        if !rest.is_empty() {
            mount_remount(target, rest | MountFlags::BIND, c"").explain(what)?;
        }
        return Ok(());
    }
    if data.len() <= MAX_OPTIONS {
        let data = CString::new(data).explain_nul(what)?;
        return mount_at(&one.source, target, &one.type_, flags, data.as_c_str()).explain(what);
    }
    let Some((parent, short)) = shorten(&data) else {
        return Err(Error::new(format!(
            "{}: its options take {} bytes, and the kernel takes {MAX_OPTIONS}",
            what(),
            data.len()
        )));
    };
    let data = CString::new(short).explain_nul(what)?;
    // Relative paths are those of the working directory, which is a thread's own only after
    // unshare.
    thread::scope(|scope| {
        let work = || {
            // SAFETY: the working directory becomes this thread's own. The thread opens nothing
            // else by a path.
            unsafe { unshare_unsafe(UnshareFlags::FS) }.explain(what)?;
            rustix::process::chdir(&parent).explain(what)?;
            mount_at(&one.source, target, &one.type_, flags, data.as_c_str()).explain(what)
        };
        let thread = thread::Builder::new().spawn_scoped(scope, work).explain(what)?;
        thread.join().unwrap_or_else(|_| Err(Error::new(what())))
    })
}

/// Splits options into flags, true for a recursive bind mount, and the file system's own options.
fn split(options: &[String]) -> (MountFlags, bool, String) {
    let mut flags = MountFlags::empty();
    let mut recursive = false;
    let mut data: Vec<&str> = Vec::new();
    for option in options {
        if option == "rbind" {
            flags |= MountFlags::BIND;
            recursive = true;
        } else if let Some((_, flag, set)) = FLAGS.iter().find(|(name, ..)| name == option) {
            flags.set(*flag, *set);
        } else {
            data.push(option);
        }
    }
    (flags, recursive, data.join(","))
}

/// Makes the paths of an overlay's lower layers relative to the directory that all of them are in.
/// `None` if that helps nothing.
fn shorten(data: &str) -> Option<(PathBuf, String)> {
    let options: Vec<&str> = data.split(',').collect();
    let lower = options.iter().find_map(|option| option.strip_prefix("lowerdir="))?;
    let layers: Vec<&str> = lower.split(':').collect();
    let mut parent = Path::new(layers.first()?).parent()?;
    while !layers.iter().all(|layer| Path::new(layer).starts_with(parent)) {
        parent = parent.parent()?;
    }
    let relative: Option<Vec<&str>> =
        layers.iter().map(|layer| Path::new(layer).strip_prefix(parent).ok()?.to_str()).collect();
    let lower = format!("lowerdir={}", relative?.join(":"));
    let short: Vec<&str> = options
        .iter()
        .map(|option| if option.starts_with("lowerdir=") { lower.as_str() } else { option })
        .collect();
    let short = short.join(",");
    (short.len() <= MAX_OPTIONS).then(|| (parent.to_owned(), short))
}

/// The explanation of a text that has a zero in it.
trait ExplainNul<T> {
    fn explain_nul(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> ExplainNul<T> for std::result::Result<T, std::ffi::NulError> {
    fn explain_nul(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|_| Error::new(format!("{}: an option has a zero byte in it", what())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_flags_or_the_file_systems_own() {
        let options = ["ro", "rbind", "index=off", "lowerdir=/a:/b"].map(str::to_owned);
        let (flags, recursive, data) = split(&options);
        assert_eq!(flags, MountFlags::RDONLY | MountFlags::BIND);
        assert!(recursive);
        assert_eq!(data, "index=off,lowerdir=/a:/b");
        assert_eq!(split(&["ro".to_owned(), "rw".to_owned()]).0, MountFlags::empty());
    }

    #[test]
    fn many_layers_become_relative() {
        let layers: Vec<String> =
            (0..120).map(|number| format!("/var/lib/containerd/snapshots/{number}/fs")).collect();
        let data = format!("upperdir=/u/fs,workdir=/u/work,lowerdir={}", layers.join(":"));
        assert!(data.len() > MAX_OPTIONS);
        let (parent, short) = shorten(&data).unwrap();
        assert_eq!(parent, Path::new("/var/lib/containerd/snapshots"));
        assert!(short.starts_with("upperdir=/u/fs,workdir=/u/work,lowerdir=0/fs:1/fs:"), "{short}");
        assert!(short.len() <= MAX_OPTIONS);
    }
}

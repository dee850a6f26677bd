//! Counts of a case's remains, in the engine's world and outside.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use super::Engine;
use crate::census;

/// The time that an engine may take to tidy up after it has reported a container as gone.
const TIDY: Duration = Duration::from_secs(60);

/// Files below /run that engines make once and keep: locks, and files for the next time.
const KEPT: [&str; 17] = [
    "/run/containerd/io.containerd.grpc.v1.cri/containers",
    "/run/containerd/io.containerd.grpc.v1.cri/sandboxes",
    "/run/containerd/io.containerd.runtime.v2.task/k8s.io",
    "/run/containerd/io.containerd.sandbox.controller.v1.shim/k8s.io",
    "/run/containerd/runc/k8s.io",
    "/run/containerd/s",
    "/run/containers",
    "/run/crun",
    "/run/libpod",
    "/run/lock",
    "/run/netns",
    "/run/netavark",
    "/run/runc",
    "/run/xtables.lock",
    "/run/isopod",
    "/run/isopod/default",
    "/run/ebtables.lock",
];

/// Docker removes the mount points of network namespaces once a minute only; their mounts are
/// counted. Podman keeps the files of its name server.
const KEPT_BELOW: [&str; 2] = ["/run/docker/netns/", "/run/containers/networks/"];

/// Everything countable of an engine, a line each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Remains(BTreeSet<String>);

impl Remains {
    pub(super) fn of(engine: &Engine) -> Self {
        let mut found = BTreeSet::new();
        census::descendants(engine.scope.keeper().pid(), &mut found);
        // A daemon may be started again.
        let daemon = engine.daemon.get().map(|daemon| format!("process {daemon} "));
        found.retain(|line| daemon.as_ref().is_none_or(|daemon| !line.starts_with(daemon)));
        let world = format!("/proc/{}", engine.world);
        mounts(&format!("{world}/mountinfo"), "", &mut found);
        // No mount of the engine may show outside its world.
        for outside in ["/proc/1/mountinfo", "/proc/self/mountinfo"] {
            mounts(outside, engine.scope.name(), &mut found);
        }
        interfaces(&format!("{world}/net/dev"), &mut found);
        cgroups(Path::new("/sys/fs/cgroup"), engine.scope.name(), &mut found);
        files(Path::new(&format!("{world}/root/run")), "/run", &mut found);
        Self(found)
    }

    /// Waits until nothing new since `before` is left, at most for [`TIDY`]. Returns the new items.
    pub(super) fn left_since(engine: &Engine, before: &Self) -> Vec<String> {
        let begun = Instant::now();
        loop {
            let now = Self::of(engine);
            let come: Vec<String> = now.0.difference(&before.0).cloned().collect();
            if come.is_empty() || begun.elapsed() > TIDY {
                return come;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

fn mounts(table: &str, name: &str, found: &mut BTreeSet<String>) {
    let text = fs::read_to_string(table).unwrap_or_else(|e| panic!("{table}: {e}"));
    for line in text.lines().filter(|line| line.contains(name)) {
        // Without the ids in front, which the kernel reuses.
        let what: Vec<&str> = line.split(' ').skip(3).collect();
        // After the first `--network host` Docker keeps that namespace, its own. Podman mounts the
        // directory of its layers on itself, and leaves the mount after a failed `run`.
        let at = what.get(1).copied().unwrap_or_default();
        if at == "/run/docker/netns/default" || at.ends_with("/storage/overlay") {
            continue;
        }
        found.insert(format!("mount in {table}: {}", what.join(" ")));
    }
}

/// The bridge of pods, which the plugins for networks keep.
const KEPT_INTERFACE: &str = "isopodcni0";

fn interfaces(table: &str, found: &mut BTreeSet<String>) {
    let text = fs::read_to_string(table).unwrap_or_else(|e| panic!("{table}: {e}"));
    let names = text.lines().filter_map(|line| line.split_once(':'));
    let names = names.map(|(name, _)| name.trim()).filter(|name| *name != KEPT_INTERFACE);
    found.extend(names.map(|name| format!("interface {name}")));
}

fn cgroups(at: &Path, name: &str, found: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(at) else { return };
    for path in entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()) {
        if path.to_string_lossy().contains(name) {
            found.insert(format!("cgroup {}", path.display()));
        }
        cgroups(&path, name, found);
    }
}

fn files(at: &Path, shown: &str, found: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(at) else { return };
    for entry in entries.flatten() {
        let shown = format!("{shown}/{}", entry.file_name().to_string_lossy());
        let kept = KEPT.contains(&&*shown) || KEPT_BELOW.iter().any(|dir| shown.starts_with(dir));
        if !kept {
            found.insert(format!("file {shown}"));
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files(&entry.path(), &shown, found);
        }
    }
}

/// Removes a cgroup and those below. A cgroup with processes stays, and is counted.
pub(super) fn remove_empty_cgroups(at: &Path) {
    for entry in fs::read_dir(at).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_empty_cgroups(&entry.path());
        }
    }
    let _ = fs::remove_dir(at);
}

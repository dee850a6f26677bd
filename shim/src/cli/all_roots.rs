//! Containers of all front ends of this host.
//!
//! Each front end has state roots of its own. They are found in two ways: engines have well-known
//! roots, and a running sandbox process has the state directories of its containers open. So no
//! register of roots is kept, and none can be left behind. A root that is in neither set has no
//! running sandbox.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use crate::{
    cli::Global,
    container_id::ContainerId,
    engine::Record,
    error::{Error, Result},
    state::{CONTAINERD_ROOT, DEFAULT_ROOT, RECORD_FILE, StateDir, ids, versions},
};

/// Directories with a root for each namespace, and the front end that calls with such a root.
const ROOTS_OF_NAMESPACES: [(&str, &str); 3] = [
    (CONTAINERD_ROOT, "containerd"),
    ("/run/docker/runtime-runc", "docker"),
    ("/run/containerd/runc", "containerd"),
];

/// Annotation with which engines of the library `containers/common` name themselves.
const MANAGER: &str = "io.container.manager";

/// Names of the processes that own sandboxes: of the command line, and of containerd's shim.
const OWNERS: [&str; 2] = ["isopod", "isopod-shim"];

/// A container, and the place of its state.
pub(super) struct Found {
    pub(super) root: PathBuf,
    pub(super) dir: StateDir,
    pub(super) record: Record,
}

impl Found {
    /// The front end that has made the container, and its namespace there if it has namespaces.
    pub(super) fn front_end(&self) -> (&str, Option<&str>) {
        for (parent, front_end) in ROOTS_OF_NAMESPACES {
            if self.root.parent() == Some(Path::new(parent)) {
                return (front_end, self.root.file_name().and_then(|name| name.to_str()));
            }
        }
        match self.record.annotations.get(MANAGER).map(String::as_str) {
            Some("libpod") => ("podman", None),
            Some("cri-o") => ("cri-o", None),
            _ => ("cli", None),
        }
    }

    /// The container that the microVM was made for: this one, or the first of its pod.
    pub(super) fn sandbox(&self) -> &ContainerId {
        self.record.pod.as_ref().map_or(&self.record.id, |pod| &pod.sandbox)
    }

    /// Tells whether this is a further container in the microVM of `first`.
    pub(super) fn is_in(&self, first: &Self) -> bool {
        self.record.pod.as_ref().is_some_and(|pod| pod.process == first.record.sandbox)
    }
}

/// The containers below `root`. The log tells of a record that cannot be read.
pub(super) fn below(root: &Path) -> Result<Vec<Found>> {
    read(root, |_| true)
}

/// The containers below `root` whose state directories are wanted.
fn read(root: &Path, is_wanted: fn(&StateDir) -> bool) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    for id in ids(root)? {
        let read = StateDir::open(root, &id).and_then(|dir| {
            let record = if is_wanted(&dir) { Record::read(&dir)? } else { None };
            Ok((record, dir))
        });
        match read {
            Ok((Some(record), dir)) => found.push(Found { root: root.to_owned(), dir, record }),
            // A container that is being made has no record yet. A container that is being deleted
            // may have lost its record.
            Ok((None, _)) => {}
            Err(error) => log::warn!("{error}"),
        }
    }
    Ok(found)
}

/// The containers of all front ends, and those below `root`. Engines keep the containers of other
/// runtimes in the same roots.
pub(super) fn everywhere(root: &Path) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    for root in roots(root) {
        found.extend(read(&root, versions::is_of_isopod)?);
    }
    Ok(found)
}

/// Finds a container below `--root`. With the default root, a container of another front end is
/// found too.
///
/// # Errors
///
/// If there is no such container, or there are several.
pub(super) fn find(global: &Global, id: &str) -> Result<Found> {
    let id = ContainerId::parse(id)?;
    let here = StateDir::open(&global.root, &id);
    if here.is_ok() || global.root != Path::new(DEFAULT_ROOT) {
        return found(&global.root, here?);
    }
    let has_it =
        |root: &PathBuf| StateDir::open(root, &id).is_ok_and(|dir| versions::is_of_isopod(&dir));
    let others: Vec<PathBuf> = roots(&global.root).into_iter().filter(has_it).collect();
    match &others[..] {
        [] => Err(Error::new(format!(
            "container does not exist: no front end has {id}; `isopod list --all` lists all \
             containers"
        ))),
        [root] => found(root, StateDir::open(root, &id)?),
        several => Err(Error::new(format!(
            "there are several containers {id}: name one by --root {}",
            several.iter().map(|root| root.display().to_string()).collect::<Vec<_>>().join(" or ")
        ))),
    }
}

fn found(root: &Path, dir: StateDir) -> Result<Found> {
    match Record::read(&dir)? {
        Some(record) => Ok(Found { root: root.to_owned(), dir, record }),
        None => Err(Error::new(format!("container {} is being made", dir.container_name()))),
    }
}

/// All roots that are known, and `root`.
fn roots(root: &Path) -> BTreeSet<PathBuf> {
    let mut roots: BTreeSet<PathBuf> = [root.to_owned(), DEFAULT_ROOT.into()].into();
    for (parent, _) in ROOTS_OF_NAMESPACES {
        let entries = fs::read_dir(parent).into_iter().flatten().flatten();
        roots.extend(entries.map(|entry| entry.path()));
    }
    roots.extend(of_processes(Path::new("/proc")));
    // /var/run is /run.
    roots.into_iter().filter_map(|root| root.canonicalize().ok()).filter(|r| r.is_dir()).collect()
}

/// The roots of the containers that running processes own.
fn of_processes(proc: &Path) -> BTreeSet<PathBuf> {
    let mut roots = BTreeSet::new();
    for process in fs::read_dir(proc).into_iter().flatten().flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let process = process.path();
        let comm = fs::read_to_string(process.join("comm")).unwrap_or_default();
        let of_root = fs::metadata(&process).is_ok_and(|metadata| metadata.uid() == 0);
        if !of_root || !OWNERS.contains(&comm.trim_end()) {
            continue;
        }
        let open = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
        let open = open.filter_map(|open| fs::read_link(open.path()).ok());
        roots.extend(open.filter_map(|dir| root_of(&dir, pid)));
    }
    roots
}

/// The root of a state directory that the process `pid` has open and owns a container in. Any
/// process may call itself as it likes, so the record there has to name it.
fn root_of(dir: &Path, pid: i32) -> Option<PathBuf> {
    if !dir.is_absolute() || !dir.join(RECORD_FILE).is_file() {
        return None;
    }
    let record = Record::read(&StateDir::open_path(dir).ok()?).ok()??;
    let names = dir.file_name().is_some_and(|name| name == record.id.as_str());
    (names && record.sandbox.pid == pid).then(|| dir.parent().map(Path::to_owned))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_of_other_runtimes_are_passed_over() {
        let root = tempfile::tempdir().unwrap();
        let make = |id: &str, state: &str| {
            let dir = StateDir::create(root.path(), &ContainerId::parse(id).unwrap()).unwrap();
            dir.write(RECORD_FILE, state.as_bytes()).unwrap();
            dir
        };
        let others = make("runcs", r#"{"id":"runcs","init_process_pid":1}"#);
        let ours = make("ours", r#"{"version":1000000,"sandbox":{"pid":1,"start_time":1}}"#);
        assert!(!versions::is_of_isopod(&others) && versions::is_of_isopod(&ours));
        assert!(everywhere(root.path()).unwrap().iter().all(|found| found.root != root.path()));
        // Nobody owns these.
        for dir in [others, ours] {
            assert_eq!(root_of(dir.path(), 1), None);
        }
    }

    #[test]
    fn this_process_owns_no_root() {
        assert!(roots(Path::new("/")).contains(Path::new("/")));
        let proc = tempfile::tempdir().unwrap();
        let own = proc.path().join("1");
        fs::create_dir_all(own.join("fd")).unwrap();
        std::os::unix::fs::symlink("/", own.join("fd/3")).unwrap();
        for comm in ["isopod\n", "sh\n"] {
            fs::write(own.join("comm"), comm).unwrap();
            assert!(of_processes(proc.path()).is_empty());
        }
    }
}

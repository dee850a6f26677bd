//! Counts of items that a runtime could leave behind.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The part of the machine to count.
#[derive(Debug)]
pub(crate) struct View<'a> {
    /// Part of the name of every container in the scope.
    pub(crate) name: &'a str,
    /// The scope's directory.
    pub(crate) dir: &'a Path,
    /// The runtime's `--root`.
    pub(crate) root: &'a Path,
    /// The scope's subreaper, whose descendants are the scope's processes.
    pub(crate) subreaper: i32,
    /// Counts items without the scope's name as well.
    pub(crate) all: bool,
}

impl View<'_> {
    fn has(&self, text: &str) -> bool {
        // Under systemd, foreign cgroups and mounts come and go all the time.
        let quiet = || !Path::new("/run/systemd/system").exists();
        text.contains(self.name) || (self.all && (text.contains("isopod") || quiet()))
    }
}

/// Everything countable at one moment, a line each: processes, mounts, sockets, cgroups,
/// directories, descriptors, shared memory, network interfaces, namespaces and redirects.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Census(BTreeSet<String>);

impl Census {
    pub(crate) fn take(view: &View<'_>) -> Self {
        let mut found = BTreeSet::new();
        processes(view, &mut found);
        mounts(view, &mut found);
        sockets(view, &mut found);
        tree("cgroup", Path::new("/sys/fs/cgroup"), true, view, &mut found);
        tree("state", view.root, false, view, &mut found);
        tree("state", Path::new("/run/isopod"), false, view, &mut found);
        tree("shared memory", Path::new("/dev/shm"), false, view, &mut found);
        network_namespaces(view, &mut found);
        if view.all {
            found.extend(disciplines());
            tree("interface", Path::new("/sys/class/net"), false, view, &mut found);
        }
        Self(found)
    }

    /// The difference from `before`, a line each: `+` for a new item, `-` for a gone one.
    pub fn since(&self, before: &Self) -> Vec<String> {
        let come = self.0.difference(&before.0).map(|item| format!("+ {item}"));
        let gone = before.0.difference(&self.0).map(|item| format!("- {item}"));
        come.chain(gone).collect()
    }

    /// The number of lines that begin with `kind`.
    pub fn count(&self, kind: &str) -> usize {
        self.0.iter().filter(|item| item.starts_with(kind)).count()
    }
}

#[derive(Debug)]
struct Process {
    name: String,
    state: char,
    parent: i32,
}

fn processes(view: &View<'_>, found: &mut BTreeSet<String>) {
    let all = all_processes();
    for (pid, process) in &all {
        if *pid == view.subreaper {
            continue;
        }
        // A zombie child of the subreaper is about to be collected.
        let ended = process.state == 'Z' && process.parent == view.subreaper;
        let known = ["isopod", "isopod-vmm", "isopod-agent", "runc"].contains(&&*process.name);
        let counted = descends(&all, *pid, view.subreaper) || (view.all && known);
        if counted && !ended {
            found.insert(line(*pid, process));
        }
        descriptors(*pid, view, found);
    }
}

/// The children of a process, with the names of their programs.
pub(crate) fn children_of(pid: i32) -> Vec<(i32, String)> {
    let all = all_processes().into_iter();
    all.filter(|(_, p)| p.parent == pid).map(|(pid, p)| (pid, p.name)).collect()
}

fn all_processes() -> BTreeMap<i32, Process> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        // The process may end meanwhile.
        let Ok(stat) = fs::read(format!("/proc/{pid}/stat")) else { continue };
        let stat = String::from_utf8_lossy(&stat);
        let Some((head, tail)) = stat.rsplit_once(')') else { continue };
        let mut fields = tail.split_whitespace();
        let state = fields.next().and_then(|s| s.chars().next()).unwrap_or('?');
        let parent = fields.next().and_then(|p| p.parse().ok()).unwrap_or(0);
        let name = head.split_once('(').map_or("", |(_, name)| name).to_owned();
        all.insert(pid, Process { name, state, parent });
    }
    all
}

/// The living descendants of `root`, a line each.
pub(crate) fn descendants(root: i32, found: &mut BTreeSet<String>) {
    let all = all_processes();
    for (pid, process) in &all {
        let ended = process.state == 'Z' && process.parent == root;
        if !ended && descends(&all, *pid, root) {
            found.insert(line(*pid, process));
        }
    }
}

fn line(pid: i32, process: &Process) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let line = String::from_utf8_lossy(&line).replace('\0', " ");
    let zombie = if process.state == 'Z' { " zombie" } else { "" };
    format!("process {pid} ({}){zombie} {line}", process.name)
}

fn descends(all: &BTreeMap<i32, Process>, mut pid: i32, from: i32) -> bool {
    // Bounded: the table was not read in one moment, so it may have a loop.
    for _ in 0..all.len() {
        let Some(process) = all.get(&pid) else { return false };
        if process.parent == from {
            return true;
        }
        pid = process.parent;
    }
    false
}

/// Ingress and clsact queueing disciplines of the first network namespace.
fn disciplines() -> Vec<String> {
    let out = std::process::Command::new("tc").args(["qdisc", "show"]).output().expect("tc");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let found = text.lines().filter(|line| line.contains("ingress") || line.contains("clsact"));
    found.map(str::to_owned).collect()
}

/// Descriptors of a process that hold a file of the scope.
fn descriptors(pid: i32, view: &View<'_>, found: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return };
    for entry in entries.flatten() {
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        if target.starts_with(view.dir) {
            let number = entry.file_name();
            found.insert(format!(
                "descriptor {} of process {pid}: {}",
                number.to_string_lossy(),
                target.display()
            ));
        }
    }
}

/// The mounts of the first mount namespace and of our own.
fn mounts(view: &View<'_>, found: &mut BTreeSet<String>) {
    for pid in ["1", "self"] {
        let table = fs::read_to_string(format!("/proc/{pid}/mountinfo")).expect("mountinfo");
        // Network namespaces are counted by their names.
        for line in table.lines().filter(|l| view.has(l) && !l.contains(" /run/netns")) {
            found.insert(format!("mount of {pid}: {line}"));
        }
    }
}

fn sockets(view: &View<'_>, found: &mut BTreeSet<String>) {
    let table = fs::read("/proc/net/unix").expect("/proc/net/unix");
    for line in String::from_utf8_lossy(&table).lines().skip(1) {
        // Columns: Num RefCount Protocol Flags Type St Inode Path.
        let mut fields = line.split_whitespace().skip(6);
        let (Some(inode), Some(path)) = (fields.next(), fields.next()) else { continue };
        if view.has(path) {
            found.insert(format!("socket {inode} {path}"));
        }
    }
}

/// Network namespaces by name.
fn network_namespaces(view: &View<'_>, found: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir("/run/netns") else { return };
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let counted = names.filter(|name| view.has(name));
    found.extend(counted.map(|name| format!("network namespace {name}")));
}

fn tree(kind: &str, at: &Path, only_dirs: bool, view: &View<'_>, found: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(at) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let is_dir = entry.file_type().is_ok_and(|t| t.is_dir());
        let text = String::from_utf8_lossy(path.as_os_str().as_bytes());
        if (is_dir || !only_dirs) && view.has(&text) {
            found.insert(format!("{kind} {text}"));
        }
        if is_dir {
            tree(kind, &path, only_dirs, view, found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_says_what_came_and_what_went() {
        let census = |items: &[&str]| Census(items.iter().map(|&i| i.to_owned()).collect());
        let before = census(&["mount a", "mount b"]);
        let after = census(&["mount b", "process 7"]);
        assert_eq!(after.since(&before), ["+ process 7", "- mount a"]);
        assert!(before.since(&before).is_empty());
    }

    #[test]
    fn a_child_of_the_keeper_is_counted_and_a_stranger_is_not() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let dir = std::env::temp_dir().join("isopod-no-such-scope");
        let count = |subreaper| {
            let name = "isopod-no-such-scope";
            let view = View { name, dir: &dir, root: &dir, subreaper, all: false };
            Census::take(&view).0.iter().filter(|i| i.contains("sleep 100")).count()
        };
        let (mine, others) = (count(own), count(own + 1));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!((mine, others), (1, 0));
    }
}

//! Cgroups made by systemd (`--systemd-cgroup`): the sandbox process is started in a transient
//! scope.
//!
//! The request goes through systemd's own client. `systemd-run --scope` waits until the scope is
//! there, with itself in it. Then it executes the program, so the pid stays the same.

use std::{
    fs,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use serde::{Deserialize, Serialize};

use crate::{
    container_id::ContainerId,
    error::{Error, Explain, Result},
};

/// Longest time for systemd to make a scope.
const SCOPE_TIMEOUT: Duration = Duration::from_secs(30);

/// Most bytes of systemd-run's message.
const MAX_WORDS: u64 = 4096;

/// A transient scope.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unit {
    slice: String,
    name: String,
}

impl Unit {
    /// Reads `slice:prefix:name`. Without a value the unit is runc's default, except for its
    /// prefix. Another form, or one that names no slice or scope, is an error.
    pub(super) fn parse(path: Option<&str>, id: &ContainerId) -> Result<Self> {
        let Some(path) = path else {
            return Ok(Self {
                slice: "system.slice".to_owned(),
                name: format!("isopod-{id}.scope"),
            });
        };
        let refuse = |why: &str| Err(Error::new(format!("linux.cgroupsPath is {path:?}: {why}")));
        let parts: Vec<&str> = path.split(':').collect();
        let [slice, prefix, name] = parts[..] else {
            return refuse("with --systemd-cgroup it has to be slice:prefix:name");
        };
        if name.is_empty() || path.contains(['/', '\0', '\n']) {
            return refuse("it does not name a scope");
        }
        if name.ends_with(".slice") {
            return refuse("a slice holds no processes");
        }
        let slice = if slice.is_empty() { "system.slice" } else { slice };
        if expand(slice).is_none() {
            return refuse(&format!("{slice:?} is not the name of a slice"));
        }
        Ok(Self { slice: slice.to_owned(), name: format!("{prefix}-{name}.scope") })
    }

    /// Name of the scope.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Path of the scope's cgroup, relative to the root of all cgroups.
    pub(super) fn path(&self) -> PathBuf {
        expand(&self.slice).unwrap_or_default().join(&self.name)
    }

    /// A command that becomes `program` in the scope.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("systemd-run");
        command
            .args(["--scope", "--collect", "--quiet", "--no-ask-password"])
            .arg(format!("--unit={}", self.name))
            .arg(format!("--slice={}", self.slice))
            .arg("--description=Isopod sandbox")
            .args(["Delegate=yes", "DefaultDependencies=no"].map(|p| format!("--property={p}")))
            .args(["CPU", "Memory", "IO", "Tasks"].map(|c| format!("--property={c}Accounting=yes")))
            .arg("--")
            .arg(program);
        command
    }
}

/// A process that keeps a scope alive, until this is dropped.
#[derive(Debug)]
pub(crate) struct Held(Child);

impl Unit {
    /// Has systemd make the scope for processes that are started later.
    ///
    /// # Errors
    ///
    /// If systemd refuses.
    pub(super) fn hold(&self) -> Result<Held> {
        let what = || format!("cannot have systemd make {}", self.name);
        // It sends back what it gets, and ends at the end of its input.
        let mut command = self.command(Path::new("cat"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().explain(what)?;
        let echoed = child.stdin.as_mut().zip(child.stdout.as_mut()).is_some_and(|(to, from)| {
            let limit = Timespec::try_from(SCOPE_TIMEOUT).ok();
            // The answer comes from the scope: systemd-run becomes the program there.
            to.write_all(b".").is_ok()
                && poll(&mut [PollFd::new(from, PollFlags::IN)], limit.as_ref()) == Ok(1)
                && from.read_exact(&mut [0]).is_ok()
        });
        let mut held = Held(child);
        if echoed {
            return Ok(held);
        }
        // It may wait for systemd still.
        let _ = held.0.kill();
        Err(Error::new(format!("{}: {}", what(), held.last_words())))
    }
}

impl Held {
    /// Directory of the scope's cgroup, relative to the root of all cgroups. systemd escapes
    /// characters that its names cannot hold, so only systemd knows it.
    pub(super) fn path(&self) -> Option<PathBuf> {
        let text = fs::read_to_string(format!("/proc/{}/cgroup", self.0.id())).ok()?;
        Some(PathBuf::from(text.strip_prefix("0::/")?.lines().next()?))
    }

    fn last_words(mut self) -> String {
        drop(self.0.stdin.take());
        let mut text = String::new();
        if let Some(stderr) = self.0.stderr.take() {
            let _ = stderr.take(MAX_WORDS).read_to_string(&mut text);
        }
        text.lines().collect::<Vec<_>>().join(" ")
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        if let Err(error) = self.0.wait() {
            log::debug!("the process that held a scope: {error}");
        }
    }
}

/// Stops a scope. A scope without processes has ended by itself. When this returns, the name can be
/// used again.
pub(super) fn stop(unit: &str) {
    let mut command = Command::new("systemctl");
    command.args(["--quiet", "--no-ask-password", "stop", unit]);
    // systemctl fails for a unit that is gone.
    match command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status() {
        Ok(status) => log::debug!("systemctl stop {unit}: {status}"),
        Err(error) => log::debug!("systemctl stop {unit}: {error}"),
    }
}

/// Sets properties of a scope until the next boot.
pub(super) fn set_properties(unit: &str, properties: &[String]) {
    if properties.is_empty() {
        return;
    }
    let mut command = Command::new("systemctl");
    command.args(["--quiet", "--no-ask-password", "--runtime", "set-property", unit]);
    let set = command.args(properties).stdin(Stdio::null()).stdout(Stdio::null()).output();
    match set {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let said = said.lines().collect::<Vec<_>>().join(" ");
            log::warn!("systemd does not know the limits of {unit}: {said}");
        }
        Err(error) => log::warn!("systemd does not know the limits of {unit}: {error}"),
    }
}

/// Tells whether systemd is the host's init, by the directory that sd_booted(3) tests.
pub(super) fn is_running() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// The cgroup of a slice: `a-b.slice` is in `a.slice`, and `-.slice` is the root.
fn expand(slice: &str) -> Option<PathBuf> {
    let name = slice.strip_suffix(".slice")?;
    if name == "-" {
        return Some(PathBuf::new());
    }
    let mut path = PathBuf::new();
    let mut prefix = String::new();
    for part in name.split('-') {
        if part.is_empty() {
            return None;
        }
        prefix.push_str(part);
        path.push(format!("{prefix}.slice"));
        prefix.push('-');
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(path: &str) -> Result<Unit> {
        Unit::parse(Some(path), &ContainerId::parse("web").unwrap())
    }

    #[test]
    fn a_path_names_a_scope_in_a_slice() {
        for (path, expected) in [
            ("system.slice:docker:web", "system.slice/docker-web.scope"),
            (":docker:web", "system.slice/docker-web.scope"),
            ("-.slice:x:web", "x-web.scope"),
            ("a-b-c.slice:x:y", "a.slice/a-b.slice/a-b-c.slice/x-y.scope"),
        ] {
            assert_eq!(parse(path).unwrap().path(), Path::new(expected), "{path}");
        }
        let default = Unit::parse(None, &ContainerId::parse("web").unwrap()).unwrap();
        assert_eq!(default.path(), Path::new("system.slice/isopod-web.scope"));
    }

    #[test]
    fn what_is_no_scope_is_refused() {
        for (path, word) in [
            ("/docker/web", "slice:prefix:name"),
            ("a:b", "slice:prefix:name"),
            ("a:b:c:d", "slice:prefix:name"),
            ("system.slice:x:", "does not name a scope"),
            ("system.slice:x:a/b", "does not name a scope"),
            ("system.slice:x:y.slice", "holds no processes"),
            ("system:x:y", "not the name of a slice"),
            ("a--b.slice:x:y", "not the name of a slice"),
            ("../x.slice:x:y", "does not name a scope"),
        ] {
            let error = parse(path).unwrap_err();
            assert!(error.message.contains(word) && error.message.contains(path), "{error}");
        }
    }
}

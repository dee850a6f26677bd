//! The compiled test programs: those of all crates, by one call of cargo.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde_json::Value as Json;

use super::Choice;
use crate::build::patient_cargo;
use crate::process::capture;

/// The crate of the end-to-end tests.
const E2E: &str = "isopod-tests";

/// The test programs that drive container engines, most cases of them twice.
const ENGINES: [&str; 4] = ["podman", "docker", "docker_newer", "workloads"];

/// A compiled test program.
#[derive(Debug, Clone)]
pub(super) struct Program {
    /// The name of its target.
    pub(super) name: String,
    /// Its file.
    pub(super) path: PathBuf,
    /// The directory of its crate.
    pub(super) dir: PathBuf,
    /// Runs only tests whose names contain it.
    pub(super) filter: Option<String>,
    /// The Debian tree that it needs, and the variable that tells it where that is.
    pub(super) tree: Option<(&'static str, PathBuf)>,
}

impl Program {
    /// Whether it drives a container engine.
    pub(super) fn is_engine(&self) -> bool {
        ENGINES.contains(&self.name.as_str())
    }

    /// Whether it is of the end-to-end tests.
    fn is_e2e(&self) -> bool {
        self.dir.ends_with("tests")
    }

    /// Its tests that its filter chooses: lines of `NAME: test`.
    pub(super) fn tests(&self) -> Result<String> {
        let mut list = Command::new(&self.path);
        capture(list.args(["--list", "--format", "terse"]).args(self.filter.iter()))
    }
}

/// The compiled programs of a run.
#[derive(Debug, Default)]
pub(super) struct Programs {
    /// Unit tests of the crates.
    pub(super) unit: Vec<Program>,
    /// End-to-end tests.
    pub(super) e2e: Vec<Program>,
}

/// Whether programs that drive engines run: among all, or by a `filter` that names one or cases of
/// them, such as `runc::attach`. Other words may be in a case's name too, and do not start an engine.
pub(super) fn needs_engines(filter: Option<&str>) -> bool {
    filter.is_none_or(|filter| ENGINES.contains(&filter) || filter.contains("::"))
}

/// The crates that a choice is about. Both kinds of tests are compiled by one call, for the features of
/// a crate that both use are then the same and it is compiled once.
pub(super) fn selection(choice: &Choice) -> &'static [&'static str] {
    match (choice.unit, choice.e2e) {
        (true, true) => &["--workspace"],
        (true, false) => &["--workspace", "--exclude", E2E],
        _ => &["--package", E2E],
    }
}

/// Compiles the tests and returns the programs that `choice` is about.
///
/// # Errors
///
/// If one does not compile, which the compiler has told of.
pub(super) fn compile(choice: &Choice) -> Result<Programs> {
    // The product's last steps, which all else waits for, leave a processor idle.
    let mut cargo = patient_cargo();
    cargo.arg("test").args(selection(choice)).args(["--no-run", "--quiet"]);
    cargo.arg("--message-format=json-render-diagnostics").stdin(Stdio::null());
    cargo.stderr(Stdio::inherit());
    let output = cargo.output().context("cannot run cargo")?;
    if !output.status.success() {
        bail!("the tests do not compile ({})", output.status);
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let mut all: Vec<Program> = messages.lines().filter_map(program).collect();
    all.sort_by(|one, other| (&one.dir, &one.name).cmp(&(&other.dir, &other.name)));
    if all.is_empty() {
        bail!("cargo built no test");
    }
    let (e2e, unit) = all.into_iter().partition(Program::is_e2e);
    Ok(Programs { unit, e2e: choose(e2e, choice.filter.as_deref())? })
}

fn program(message: &str) -> Option<Program> {
    let message: Json = serde_json::from_str(message).ok()?;
    let is_test = message["profile"]["test"] == true;
    let path = message["executable"].as_str().filter(|_| is_test)?.into();
    let name = message["target"]["name"].as_str()?.to_owned();
    let dir = Path::new(message["manifest_path"].as_str()?).parent()?.to_owned();
    Some(Program { name, path, dir, filter: None, tree: None })
}

/// The end-to-end programs that have tests which `filter` chooses, each with what it is to be told.
fn choose(mut programs: Vec<Program>, filter: Option<&str>) -> Result<Vec<Program>> {
    if !needs_engines(filter) {
        programs.retain(|program| !program.is_engine());
    }
    let Some(filter) = filter else {
        return Ok(programs);
    };
    let mut chosen = Vec::new();
    for mut program in programs {
        if program.name != filter {
            program.filter = Some(filter.to_owned());
            if program.tests()?.is_empty() {
                continue;
            }
        }
        chosen.push(program);
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_told_apart_by_their_crate() {
        let message = |dir: &str, test: bool| {
            format!(
                r#"{{"reason":"compiler-artifact","manifest_path":"{dir}/Cargo.toml",
                "target":{{"name":"x"}},"profile":{{"test":{test}}},"executable":"/x"}}"#
            )
        };
        assert!(program(&message("/repo/tests", true)).is_some_and(|p| p.is_e2e()));
        assert!(program(&message("/repo/shim", true)).is_some_and(|p| !p.is_e2e()));
        assert!(program(&message("/repo/shim", false)).is_none());
    }
}

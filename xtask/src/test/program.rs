//! The compiled test programs of all crates.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde_json::Value as Json;

use super::choice::Choice;
use crate::build::patient_cargo;
use crate::process::capture;

/// The package of the end-to-end tests.
const E2E: &str = "isopod-tests";

/// The test programs that drive container engines. Most of their cases run with runc and Isopod.
const ENGINES: [&str; 7] = [
    "podman",
    "docker",
    "docker_newer",
    "containerd",
    "containerd_older",
    "containerd_newer",
    "workloads",
];

/// Programs that run again with another version of their engine, and the names of these runs.
const VERSIONS: [(&str, [&str; 2]); 1] = [("containerd", ["containerd_older", "containerd_newer"])];

/// Environment variable with the name of such a run for the test program.
const VERSION: &str = "ISOPOD_TEST_VERSION";

/// A compiled test program.
#[derive(Debug, Clone)]
pub(super) struct Program {
    /// Name of the cargo target, or of a run with another version of its engine.
    pub(super) name: String,
    /// Name of the cargo target.
    pub(super) target: String,
    /// The program file.
    pub(super) path: PathBuf,
    /// The directory of its crate.
    pub(super) dir: PathBuf,
    /// Part of the names of the tests to run; none runs all tests.
    pub(super) filter: Option<String>,
    /// Environment variable for the path of its Debian tree, and that path, if it needs a tree.
    pub(super) tree: Option<(&'static str, PathBuf)>,
}

impl Program {
    /// Tells if the program drives a container engine.
    pub(super) fn is_engine(&self) -> bool {
        ENGINES.contains(&self.name.as_str())
    }

    /// Tells if the program is of the end-to-end tests.
    fn is_e2e(&self) -> bool {
        self.dir.ends_with("tests")
    }

    /// The tests that match the filter, as lines `NAME: test`.
    pub(super) fn tests(&self) -> Result<String> {
        let mut list = Command::new(&self.path);
        list.env(VERSION, self.version().1);
        capture(list.args(["--list", "--format", "terse"]).args(self.filter.iter()))
    }

    /// The variable with the version of the engine for the test program: empty for the usual one.
    pub(super) fn version(&self) -> (&'static str, &str) {
        (VERSION, if self.name == self.target { "" } else { &self.name })
    }

    /// The runs of the program: with the usual version of its engine, and with others.
    fn versions(self) -> Vec<Self> {
        let others = VERSIONS.iter().find(|(target, _)| *target == self.target);
        let names = others.map(|(_, names)| names.as_slice()).unwrap_or_default();
        let of = |name: &&str| Self { name: (*name).to_owned(), ..self.clone() };
        let others: Vec<Self> = names.iter().map(of).collect();
        [vec![self], others].concat()
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

/// Tells if programs that drive engines run.
///
/// They run without a filter, and with a filter that is their name or contains `::`
/// (`runc::attach`). Another filter may be part of a case's name, but starts no engine.
pub(super) fn needs_engines(filter: Option<&str>) -> bool {
    filter.is_none_or(|filter| ENGINES.contains(&filter) || filter.contains("::"))
}

/// cargo's options for the packages of a choice.
///
/// One call compiles unit and end-to-end tests. A dependency then has the same features in both and
/// is compiled once.
pub(super) fn selection(choice: &Choice) -> &'static [&'static str] {
    match (choice.unit, choice.e2e) {
        (true, true) => &["--workspace"],
        (true, false) => &["--workspace", "--exclude", E2E],
        _ => &["--package", E2E],
    }
}

/// Compiles the tests. Returns the programs of `choice`. The compiler prints its errors itself.
pub(super) fn compile(choice: &Choice) -> Result<Programs> {
    // Low priority: the product takes longest, and its last steps leave a processor idle for this.
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
    let (e2e, unit): (Vec<_>, Vec<_>) = all.into_iter().partition(Program::is_e2e);
    let e2e = e2e.into_iter().flat_map(Program::versions).collect();
    Ok(Programs { unit, e2e: choose(e2e, choice.filter.as_deref())? })
}

/// The test program in a message of cargo, if there is one.
fn program(message: &str) -> Option<Program> {
    let message: Json = serde_json::from_str(message).ok()?;
    let is_test = message["profile"]["test"] == true;
    let path = message["executable"].as_str().filter(|_| is_test)?.into();
    let name = message["target"]["name"].as_str()?.to_owned();
    let dir = Path::new(message["manifest_path"].as_str()?).parent()?.to_owned();
    Some(Program { target: name.clone(), name, path, dir, filter: None, tree: None })
}

/// The end-to-end programs with tests that match `filter`. Sets the filter of each.
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

    #[test]
    fn a_program_runs_with_each_version_of_its_engine() {
        let of = |name: &str| {
            let (name, path) = (name.to_owned(), PathBuf::from("/x"));
            let program = Program {
                target: name.clone(),
                name,
                path: path.clone(),
                dir: path,
                filter: None,
                tree: None,
            };
            let all = program.versions();
            all.iter().map(|p| (p.name.clone(), p.version().1.to_owned())).collect::<Vec<_>>()
        };
        let owned = |(name, version): (&str, &str)| (name.to_owned(), version.to_owned());
        assert_eq!(of("exec"), [("exec", "")].map(owned));
        let expected = [
            ("containerd", ""),
            ("containerd_older", "containerd_older"),
            ("containerd_newer", "containerd_newer"),
        ];
        assert_eq!(of("containerd"), expected.map(owned));
    }
}

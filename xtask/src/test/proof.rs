//! Proofs: cases of engines that passed with runc in an earlier run. They need no second run with
//! runc.
//!
//! A proof holds until one of its inputs changes. The cache keeps it, and so does a file of the
//! repository for a machine that has no cache yet, under a key over the inputs:
//!
//! - the source of the case, the harness, and how the program starts its engine;
//! - the versions of the crates, and the packages of engine and runtime;
//! - the program file of runc, and the kernel.
//!
//! A test program reports a proof if the case has passed and the engine has left nothing behind.

mod source;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use self::source::Sources;
use super::program::Program;
use crate::apt;
use crate::cache;
use crate::process::capture;
use crate::progress::say;
use crate::repository;

/// Environment variable with the proven cases for the test program, separated by blanks.
pub(super) const VARIABLE: &str = "ISOPOD_TEST_PROVEN";

/// Prefix of the names of cases with runc.
const WITH_RUNC: &str = "runc::";

/// Prefix of the output line with the cases that a test program has proven.
const PROVEN: &str = "proven with runc:";

/// Time after which an unused proof is removed.
const KEPT: Duration = Duration::from_secs(90 * 24 * 3600);

/// Proofs that the repository keeps, relative to its root: a program, a case and a key in each line.
const RECORD: &str = "tests/proofs.txt";

/// First lines of [`RECORD`].
const RECORD_HEAD: &str = "\
# Cases of engines that passed with runc: program, case, and a hash over all that the proof rests on.
# `cargo xtask test --record-proofs` writes this file. A line whose hash is outdated proves nothing.
";

/// Path of runc below the root of this machine or of a tree.
const RUNC: &str = "usr/sbin/runc";

/// Packages that a case with runc runs: engines, the programs that they call, and the image.
const PACKAGES: [&str; 18] = [
    "aardvark-dns",
    "busybox-static",
    "catatonit",
    "conmon",
    "containerd",
    "containernetworking-plugins",
    "docker.io",
    "golang-github-containers-common",
    "golang-github-containers-image",
    "iproute2",
    "iptables",
    "libc6",
    "libseccomp2",
    "netavark",
    "podman",
    "runc",
    "tar",
    "tini",
];

/// The proofs of the cases of one program.
#[derive(Debug)]
pub(super) struct Proofs {
    shelf: PathBuf,
    program: String,
    /// Key over the inputs of all proofs: all but the case.
    inputs: String,
    sources: Sources,
    /// Keys of the proofs that the repository keeps.
    recorded: BTreeSet<String>,
}

impl Proofs {
    /// Proofs of the cases of `program` under the kernel `kernel`.
    ///
    /// `tree` is the root of the engine's Debian tree; none for an engine of this machine.
    pub(super) fn of(program: &str, tree: Option<&Path>, kernel: &str) -> Result<Self> {
        let sources = Sources::read()?;
        let mut inputs = vec![
            ("program", sources.program(program)?),
            ("harness", sources.harness()?),
            ("packages", apt::versions(&PACKAGES)?.into_bytes()),
            ("kernel", kernel.as_bytes().to_vec()),
            ("runc", cache::part(&Path::new("/").join(RUNC))?),
        ];
        if let Some(tree) = tree {
            inputs.push(("tree's packages", cache::part(&tree.join("var/lib/dpkg/status"))?));
            // A tree without an engine has no runc.
            inputs.push(("tree's runc", fs::read(tree.join(RUNC)).unwrap_or_default()));
        }
        let inputs = cache::key(inputs.iter().map(|(name, content)| (*name, &content[..])));
        let shelf = cache::root()?.join("proof");
        let recorded = recorded(&fs::read_to_string(record_file()).unwrap_or_default());
        Ok(Self { shelf, program: program.to_owned(), inputs, sources, recorded })
    }

    /// Names of the proven cases among the program's `tests`.
    ///
    /// `tests` has a line `NAME: test` for each test. Fails if the sources lack a case.
    pub(super) fn remembered(&self, tests: &str) -> Result<Vec<String>> {
        let names = tests.lines().filter_map(|line| line.strip_suffix(": test"));
        let cases = names.filter_map(|name| name.strip_prefix(WITH_RUNC));
        let mut proven = Vec::new();
        for case in cases {
            let key = self.key(case)?;
            let file = self.shelf.join(&key);
            if self.failed(&key).exists() {
                continue;
            }
            if file.exists() {
                cache::used(&file);
            } else if !self.recorded.contains(&key) {
                continue;
            }
            proven.push(case.to_owned());
        }
        Ok(proven)
    }

    /// Keeps the proofs in the `output` of a program, and removes proofs of cases that have failed.
    pub(super) fn learn(&self, output: &[u8]) {
        let outcome = Outcome::read(&String::from_utf8_lossy(output));
        let result =
            outcome.failed.iter().try_for_each(|case| self.disprove(case)).and_then(|()| {
                outcome.proven.iter().try_for_each(|case| {
                    let line = format!("{} {WITH_RUNC}{case}\n", self.program);
                    forget(&self.failed(&self.key(case)?))?;
                    cache::write(&self.file(case)?, line.as_bytes())
                })
            });
        if let Err(error) = result {
            say(format!("the next run does not know what runc has proven in this one: {error:#}"));
        }
        cache::forget_unused(&self.shelf, KEPT);
    }

    /// Forgets the proof of a case, and has no proof of the repository count either.
    fn disprove(&self, case: &str) -> Result<()> {
        forget(&self.file(case)?)?;
        cache::write(&self.failed(&self.key(case)?), b"")
    }

    /// File that says that the case of this key has failed since it was proven.
    fn failed(&self, key: &str) -> PathBuf {
        self.shelf.join(format!("{key}.failed"))
    }

    /// File of the proof of a case.
    fn file(&self, case: &str) -> Result<PathBuf> {
        Ok(self.shelf.join(self.key(case)?))
    }

    /// Key of the proof of a case.
    fn key(&self, case: &str) -> Result<String> {
        let source = self.sources.case(case)?;
        let parts = [("inputs", self.inputs.as_bytes()), ("name", case.as_bytes())];
        Ok(cache::key(parts.into_iter().chain([("case", &source[..])])))
    }
}

/// Writes the proofs of `programs` that hold now to the repository. Returns their number.
pub(super) fn record(programs: &[Program], kernel: &str) -> Result<usize> {
    let mut lines = BTreeSet::new();
    for program in programs.iter().filter(|program| program.is_engine()) {
        let tree = program.tree.as_ref().map(|(_, tree)| tree.as_path());
        let proofs = Proofs::of(&program.target, tree, kernel)?;
        for case in proofs.remembered(&program.tests()?)? {
            lines.insert(format!("{} {WITH_RUNC}{case} {}\n", program.name, proofs.key(&case)?));
        }
    }
    let text: String = [RECORD_HEAD].into_iter().chain(lines.iter().map(String::as_str)).collect();
    cache::write(&record_file(), text.as_bytes())?;
    Ok(lines.len())
}

fn record_file() -> PathBuf {
    repository::root().join(RECORD)
}

/// The keys in the text of [`RECORD`].
fn recorded(text: &str) -> BTreeSet<String> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.split(' ').nth(2)).map(str::to_owned).collect()
}

/// Results of cases with runc in the output of a program.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    proven: BTreeSet<String>,
    failed: BTreeSet<String>,
}

impl Outcome {
    /// Reads the output of a program. A case that failed is not proven, even if reported so.
    fn read(output: &str) -> Self {
        let failed = output.lines().filter_map(|line| {
            let name = line.strip_prefix("test ")?.strip_suffix("FAILED")?.trim_end();
            name.strip_suffix("...")?.trim().strip_prefix(WITH_RUNC).map(str::to_owned)
        });
        let failed: BTreeSet<String> = failed.collect();
        let told = output.lines().filter_map(|line| line.strip_prefix(PROVEN));
        let told = told.flat_map(str::split_whitespace).map(str::to_owned);
        Self { proven: told.filter(|case| !failed.contains(case)).collect(), failed }
    }
}

/// Release and build of this machine's kernel.
pub(super) fn own_kernel() -> Result<String> {
    capture(Command::new("uname").args(["-r", "-v"]))
}

/// Removes a proof, if it exists.
fn forget(proof: &Path) -> Result<()> {
    match fs::remove_file(proof) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", proof.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn only_what_is_told_and_has_not_failed_is_proven() {
        let output = "test              runc::exec   ... ok\n\
                      test              runc::stop   ... FAILED\n\
                      test              isopod::stop ... FAILED\n\
                      test [remembered] runc::kill   ... ok\n\
                      proven with runc: exec stop\n";
        let expected = Outcome { proven: set(&["exec"]), failed: set(&["stop"]) };
        assert_eq!(Outcome::read(output), expected);
        // Passed, but not reported: the engine has left something behind.
        let output = "test runc::exec ... ok\n";
        assert_eq!(Outcome::read(output), Outcome { proven: set(&[]), failed: set(&[]) });
    }

    #[test]
    fn a_proof_is_found_until_something_of_it_changes() {
        let shelf = std::env::temp_dir().join(format!("xtask-proof-{}", std::process::id()));
        let proofs = |kernel: &str, record: &str| Proofs {
            shelf: shelf.clone(),
            program: "docker".to_owned(),
            inputs: kernel.to_owned(),
            sources: Sources::read().unwrap(),
            recorded: recorded(record),
        };
        let tests = "runc::exec: test\nrunc::exec_detached: test\nisopod::exec: test\n";
        let remembered = |kernel: &str| proofs(kernel, "").remembered(tests).unwrap();
        assert!(remembered("6.1").is_empty());
        proofs("6.1", "").learn(b"proven with runc: exec\n");
        assert_eq!(remembered("6.1"), ["exec"]);
        assert!(remembered("6.2").is_empty());
        proofs("6.1", "").learn(b"test runc::exec ... FAILED\n");
        assert!(remembered("6.1").is_empty());
        // The repository proves the same for a machine without a cache.
        let key = proofs("6.1", "").key("exec").unwrap();
        let record = format!("{RECORD_HEAD}docker runc::exec {key}\n");
        assert!(proofs("6.1", &record).remembered(tests).unwrap().is_empty(), "it failed");
        proofs("6.1", "").learn(b"proven with runc: exec\n");
        fs::remove_dir_all(&shelf).unwrap();
        assert_eq!(proofs("6.1", &record).remembered(tests).unwrap(), ["exec"]);
        assert!(proofs("6.2", &record).remembered(tests).unwrap().is_empty());
        // `learn` made the shelf, and nothing else has.
        let _ = fs::remove_dir_all(&shelf);
    }
}

//! `cargo xtask test`: the unit tests, then the end-to-end tests against the built product.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use lexopt::prelude::*;
use serde_json::Value as Json;

use crate::apt;
use crate::build::{self, cargo};
use crate::lab::{self, Ended, Input, Options, Run, Show};
use crate::place::Place;
use crate::progress::{seconds, step};
use crate::repository;

const HELP: &str = "\
Usage: cargo xtask test [--unit | --e2e] [FILTER]

  FILTER    only tests whose name contains it
  --unit    only the unit tests
  --e2e     only the end-to-end tests

The end-to-end tests run on this machine if it has hardware KVM, and else in the lab.
ISOPOD_LAB=force or ISOPOD_LAB=off decides otherwise.";

/// How long a test program may print nothing.
const SILENCE: Duration = Duration::from_secs(15 * 60);

/// Where the tests make their files.
const SCRATCH: &str = "/tmp/isopod-tests";

/// Runs the tests; the exit status is 0 when all of them pass.
pub(crate) fn main(mut args: lexopt::Parser) -> Result<i32> {
    let began = Instant::now();
    let (mut unit, mut e2e) = (true, true);
    let mut filter: Option<String> = None;
    while let Some(arg) = args.next()? {
        match arg {
            Long("help") | Short('h') => {
                println!("{HELP}");
                return Ok(0);
            }
            Long("unit") => e2e = false,
            Long("e2e") => unit = false,
            Value(word) if filter.is_none() => filter = Some(word.string()?),
            _ => return Err(arg.unexpected().into()),
        }
    }
    if !unit && !e2e {
        bail!("--unit and --e2e leave nothing to test");
    }
    apt::ensure(build::needs().chain(lab::NEEDS))?;
    let mut total = Tally::default();
    if unit {
        total.add(&unit_tests(filter.as_deref())?);
    }
    if e2e {
        total.add(&end_to_end_tests(filter.as_deref())?);
    }
    println!("\nall tests, {}:\n{total}", seconds(began));
    Ok(i32::from(!total.passed_all()))
}

fn unit_tests(filter: Option<&str>) -> Result<Tally> {
    let words = ["cargo", "test", "--workspace", "--exclude", "isopod-tests", "--no-fail-fast"];
    let mut run = Run::here(words.into_iter().map(str::to_owned).collect())?;
    run.cwd = repository::root().to_owned();
    run.argv.extend(filter.map(str::to_owned));
    let mut output = Vec::new();
    let ended =
        step("unit tests", || Place::Here.run(&run, Input::Nothing, &mut Show::Also(&mut output)))?;
    Ok(Tally::of("unit tests", &output, &ended))
}

fn end_to_end_tests(filter: Option<&str>) -> Result<Tally> {
    let product = build::build()?;
    let probe = step("compile the tests' probe", || build::compile(&["isopod-tests"]))?;
    build::place(&probe.join("isopod-probe"), &product.join("isopod-probe"))?;
    let binaries = step("compile the end-to-end tests", test_binaries)?;
    let place = Place::open(&Options::default())?;
    let programs = place.bring(&product)?;
    place.must(&["mkdir", "-p", SCRATCH])?;
    let mut total = Tally::default();
    for binary in &binaries {
        let name = binary.name.as_str();
        let mut run = Run::here(vec![binary.path.display().to_string()])?;
        run.argv.extend(filter.map(str::to_owned));
        // An emulated processor is slow, and a test has bounds; some run several sandboxes anyway.
        if matches!(place, Place::Lab(_)) {
            run.argv.push("--test-threads=1".to_owned());
        }
        run.cwd = "/".into();
        run.quiet_limit = Some(SILENCE);
        let run = run
            .env("ISOPOD_BIN_DIR", programs.display().to_string())
            .env("ISOPOD_TEST_DIR", SCRATCH);
        let mut output = Vec::new();
        let ended = step(&format!("end-to-end tests {}: {name}", place.name()), || {
            place.run(&run, Input::Nothing, &mut Show::Also(&mut output))
        })?;
        total.add(&Tally::of(name, &output, &ended));
    }
    if let Place::Here = place {
        // Fails when a test left something there, which the test itself has reported.
        let _ = std::fs::remove_dir(Path::new(SCRATCH));
    }
    Ok(total)
}

/// A compiled test program.
struct TestBinary {
    name: String,
    path: PathBuf,
}

/// Compiles the end-to-end tests.
fn test_binaries() -> Result<Vec<TestBinary>> {
    let mut cargo = cargo();
    cargo.args(["test", "--package", "isopod-tests", "--no-run", "--quiet"]);
    cargo.arg("--message-format=json-render-diagnostics").stdin(Stdio::null());
    cargo.stderr(Stdio::inherit());
    let output = cargo.output().context("cannot run cargo")?;
    if !output.status.success() {
        bail!("the end-to-end tests do not compile ({})", output.status);
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let mut binaries: Vec<TestBinary> = messages.lines().filter_map(test_binary).collect();
    binaries.sort_by(|one, other| one.name.cmp(&other.name));
    if binaries.is_empty() {
        bail!("cargo built no end-to-end test");
    }
    Ok(binaries)
}

fn test_binary(message: &str) -> Option<TestBinary> {
    let message: Json = serde_json::from_str(message).ok()?;
    let is_test = message["profile"]["test"] == true;
    let path = message["executable"].as_str().filter(|_| is_test)?.into();
    Some(TestBinary { name: message["target"]["name"].as_str()?.to_owned(), path })
}

/// Results of test programs, in the words of their runner.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
    ignored: u64,
    filtered_out: u64,
    /// Programs that failed, and how.
    failures: Vec<String>,
}

impl Tally {
    /// What a run called `name` that printed `output` amounts to.
    fn of(name: &str, output: &[u8], ended: &Ended) -> Self {
        let mut tally = Self::default();
        for line in String::from_utf8_lossy(output).lines() {
            // `test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; ...`
            let Some(counts) = line.strip_prefix("test result: ") else { continue };
            for part in counts.split(['.', ';']) {
                let Some((number, what)) = part.trim().split_once(' ') else { continue };
                let Ok(number) = number.parse::<u64>() else { continue };
                match what {
                    "passed" => tally.passed += number,
                    "failed" => tally.failed += number,
                    "ignored" => tally.ignored += number,
                    "filtered out" => tally.filtered_out += number,
                    _ => {}
                }
            }
        }
        match ended {
            Ended::Status(0) => {}
            Ended::Status(status) => tally.failures.push(format!("{name} (exit status {status})")),
            Ended::Refused(why) => tally.failures.push(format!("{name} ({why})")),
        }
        tally
    }

    fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        self.filtered_out += other.filtered_out;
        self.failures.extend_from_slice(&other.failures);
    }

    fn passed_all(&self) -> bool {
        self.failed == 0 && self.failures.is_empty()
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for failure in &self.failures {
            writeln!(f, "failed: {failure}")?;
        }
        let verdict = if self.passed_all() { "ok" } else { "FAILED" };
        let Self { passed, failed, ignored, filtered_out, .. } = self;
        write!(
            f,
            "test result: {verdict}. {passed} passed; {failed} failed; {ignored} ignored; \
             0 measured; {filtered_out} filtered out"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &[u8] = b"running 4 tests\n\
        test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.5s\n\
        test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1s\n";

    #[test]
    fn results_of_several_programs_add_up() {
        let tally = Tally::of("x", OUTPUT, &Ended::Status(101));
        assert_eq!((tally.passed, tally.failed, tally.ignored, tally.filtered_out), (4, 2, 1, 2));
        assert_eq!(tally.failures, ["x (exit status 101)"]);
        assert!(tally.to_string().ends_with(
            "test result: FAILED. 4 passed; 2 failed; 1 ignored; 0 measured; 2 filtered out"
        ));
    }

    #[test]
    fn a_program_that_dies_without_a_result_fails() {
        assert!(!Tally::of("x", b"", &Ended::Status(139)).passed_all());
        assert!(Tally::of("x", b"", &Ended::Status(0)).passed_all());
    }
}

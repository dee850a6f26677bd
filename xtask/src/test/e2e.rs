//! The end-to-end tests: on this machine one program after the other, or in several labs at a time.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use serde_json::Value as Json;

use super::tally::Tally;
use crate::build::{self, cargo};
use crate::lab::{self, Input, Run, Show};
use crate::place::{self, Place};
use crate::progress::{say, step};

/// How long a test program may print nothing.
const SILENCE: Duration = Duration::from_secs(15 * 60);

/// Where the tests make their files.
const SCRATCH: &str = "/tmp/isopod-tests";

/// The test program that needs a machine with two processors.
const NEEDS_TWO_CPUS: &str = "smp";

/// Builds what is tested and the tests, and runs those whose name contains `filter`.
pub(super) fn run(filter: Option<&str>) -> Result<Tally> {
    let product = build::build()?;
    let probe = step("compile the tests' probe", || build::compile(&["isopod-tests"]))?;
    build::place(&probe.join("isopod-probe"), &product.join("isopod-probe"))?;
    let programs = step("compile the end-to-end tests", test_programs)?;
    if place::is_here(false)? {
        let site = Site::prepare(Place::Here, &product, filter)?;
        let mut total = Tally::default();
        for program in &programs {
            let what = format!("end-to-end tests: {}", program.name);
            total.add(&step(&what, || site.run(program, false))?);
        }
        // Fails when a test left something there, which the test itself has reported.
        let _ = std::fs::remove_dir(SCRATCH);
        return Ok(total);
    }
    in_labs(programs, &product, filter)
}

/// Runs the tests in as many labs as this machine has processors for.
fn in_labs(programs: Vec<TestProgram>, product: &Path, filter: Option<&str>) -> Result<Tally> {
    lab::prepare()?;
    let count = thread::available_parallelism().map_or(1, usize::from).clamp(1, 4);
    let (smp, programs): (Vec<_>, Vec<_>) =
        programs.into_iter().partition(|program| program.name == NEEDS_TWO_CPUS);
    let queue = Mutex::new(VecDeque::from(programs));
    let total = Mutex::new(Tally::default());
    let work = |options: &lab::Options, queue: &Mutex<VecDeque<TestProgram>>| {
        let site =
            Site::prepare(Place::Lab(Box::new(lab::Lab::private(options)?)), product, filter)?;
        loop {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            let Some(program) = next else { return Ok(()) };
            let what = format!("end-to-end tests in the lab: {}", program.name);
            let tally = step(&what, || site.run(&program, true))?;
            total.lock().unwrap_or_else(PoisonError::into_inner).add(&tally);
        }
    };
    let options = lab::Options::for_one_of(count);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..count).map(|_| scope.spawn(|| work(&options, &queue))).collect();
        let ended = workers.into_iter().map(|worker| {
            worker.join().unwrap_or_else(|_| Err(anyhow!("a thread of the tests panicked")))
        });
        // All of them end before the first error counts.
        ended.collect::<Vec<Result<()>>>().into_iter().collect::<Result<()>>()
    })?;
    work(&lab::Options { cpus: 2, ..options }, &Mutex::new(VecDeque::from(smp)))?;
    Ok(total.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// A place with the product and room for the tests' files.
struct Site<'a> {
    place: Place,
    product: PathBuf,
    filter: Option<&'a str>,
}

impl<'a> Site<'a> {
    fn prepare(place: Place, product: &Path, filter: Option<&'a str>) -> Result<Self> {
        let product = place.bring(product)?;
        place.must(&["mkdir", "-p", SCRATCH])?;
        Ok(Self { place, product, filter })
    }

    /// Runs one program. Its output is shown as it comes, or, if `whole`, when it has ended.
    fn run(&self, program: &TestProgram, whole: bool) -> Result<Tally> {
        let mut run = Run::here(vec![program.path.display().to_string()])?;
        run.argv.extend(self.filter.map(str::to_owned));
        // An emulated processor is slow, and tests have bounds; some run several sandboxes anyway.
        if matches!(self.place, Place::Lab(_)) {
            run.argv.push("--test-threads=1".to_owned());
        }
        run.cwd = "/".into();
        run.quiet_limit = Some(SILENCE);
        let run = run
            .env("ISOPOD_BIN_DIR", self.product.display().to_string())
            .env("ISOPOD_TEST_DIR", SCRATCH);
        let mut output = Vec::new();
        let mut show = if whole { Show::Only(&mut output) } else { Show::Also(&mut output) };
        let ended = self.place.run(&run, Input::Nothing, &mut show);
        if whole {
            static TERMINAL: Mutex<()> = Mutex::new(());
            let _one = TERMINAL.lock().unwrap_or_else(PoisonError::into_inner);
            say(format!("what {} printed:", program.name));
            Show::Through.stdout(&output).context("cannot write output")?;
        }
        Ok(Tally::of(&program.name, &output, &ended?))
    }
}

/// A compiled test program.
struct TestProgram {
    name: String,
    path: PathBuf,
}

/// Compiles the end-to-end tests.
fn test_programs() -> Result<Vec<TestProgram>> {
    let mut cargo = cargo();
    cargo.args(["test", "--package", "isopod-tests", "--no-run", "--quiet"]);
    cargo.arg("--message-format=json-render-diagnostics").stdin(Stdio::null());
    cargo.stderr(Stdio::inherit());
    let output = cargo.output().context("cannot run cargo")?;
    if !output.status.success() {
        bail!("the end-to-end tests do not compile ({})", output.status);
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let mut programs: Vec<TestProgram> = messages.lines().filter_map(test_program).collect();
    programs.sort_by(|one, other| one.name.cmp(&other.name));
    if programs.is_empty() {
        bail!("cargo built no end-to-end test");
    }
    Ok(programs)
}

fn test_program(message: &str) -> Option<TestProgram> {
    let message: Json = serde_json::from_str(message).ok()?;
    let is_test = message["profile"]["test"] == true;
    let path = message["executable"].as_str().filter(|_| is_test)?.into();
    Some(TestProgram { name: message["target"]["name"].as_str()?.to_owned(), path })
}

//! The end-to-end tests: on this machine one program after the other, or in several labs at a time.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value as Json;

use super::tally::Tally;
use super::tree::TREES;
use crate::build::{self, cargo};
use crate::lab::{self, Input, Lab, Run, Show};
use crate::place::{self, Place};
use crate::process::capture;
use crate::progress::{say, step};

/// How long a test program may print nothing.
const SILENCE: Duration = Duration::from_secs(15 * 60);

/// Where the tests make their files.
const SCRATCH: &str = "/tmp/isopod-tests";

/// The test program that needs a machine with two processors.
const NEEDS_TWO_CPUS: &str = "smp";

/// The test programs that drive container engines, most cases of them twice. They are the longest of
/// all, the first of them more so than the last.
const ENGINES: [&str; 4] = ["podman", "docker", "docker_newer", "workloads"];

/// Whether programs that drive engines run: among all, or by a `filter` that names one or cases of
/// them, such as `runc::attach`. Other words may be in a case's name too, and do not start an engine.
pub(super) fn needs_engines(filter: Option<&str>) -> bool {
    filter.is_none_or(|filter| ENGINES.contains(&filter) || filter.contains("::"))
}

/// Builds what is tested and the tests, and runs those that `filter` chooses.
pub(super) fn run(filter: Option<&str>) -> Result<Tally> {
    let product = build::build()?;
    let probe = step("compile the tests' probe", || build::compile(&["isopod-tests"]))?;
    build::place(&probe.join("isopod-probe"), &product.join("isopod-probe"))?;
    let programs = step("compile the end-to-end tests", test_programs)?;
    let mut programs = choose(programs, filter)?;
    if programs.is_empty() {
        return Ok(Tally::default());
    }
    // Before a lab looks at this machine's files.
    for program in &mut programs {
        if let Some(tree) = TREES.iter().find(|tree| tree.program == program.name) {
            program.tree = Some((tree.variable, tree.ensure()?));
        }
    }
    if !place::is_here(false)? {
        return in_labs(programs, &product);
    }
    let site = Site::prepare(Place::Here, &product)?;
    let mut total = Tally::default();
    for program in &programs {
        let what = format!("end-to-end tests: {}", program.name);
        total.add(&step(&what, || site.run(program, false))?);
    }
    // Fails when a test left something there, which the test itself has reported.
    let _ = std::fs::remove_dir(SCRATCH);
    Ok(total)
}

/// The programs that have tests which `filter` chooses, each with what it is to be told.
fn choose(mut programs: Vec<TestProgram>, filter: Option<&str>) -> Result<Vec<TestProgram>> {
    if !needs_engines(filter) {
        programs.retain(|program| !ENGINES.contains(&program.name.as_str()));
    }
    let Some(filter) = filter else {
        return Ok(programs);
    };
    let mut chosen = Vec::new();
    for mut program in programs {
        if program.name != filter {
            let mut list = Command::new(&program.path);
            // Lines of `NAME: test`, none of them if nothing fits.
            if capture(list.args(["--list", "--format", "terse", filter]))?.is_empty() {
                continue;
            }
            program.filter = Some(filter.to_owned());
        }
        chosen.push(program);
    }
    Ok(chosen)
}

/// Runs the programs in as many labs as this machine has processors and memory for.
fn in_labs(programs: Vec<TestProgram>, product: &Path) -> Result<Tally> {
    lab::prepare()?;
    let (smp, mut programs): (Vec<_>, Vec<_>) =
        programs.into_iter().partition(|program| program.name == NEEDS_TWO_CPUS);
    // Whatever is long comes first, lest one lab be busy with it while the others have nothing to do.
    programs.sort_by_key(|program| {
        ENGINES.iter().position(|name| *name == program.name).unwrap_or(ENGINES.len())
    });
    let (count, options) = lab::Options::side_by_side(programs.len());
    let labs = Labs { product, total: Mutex::new(Tally::default()) };
    let queue = Queue::new(VecDeque::from(programs));
    thread::scope(|scope| {
        for _ in 0..count {
            scope.spawn(|| labs.work(&options, &queue));
        }
    });
    let smp = Queue::new(VecDeque::from(smp));
    labs.work(&lab::Options { cpus: 2, ..options }, &smp);
    let mut total = labs.total.into_inner().unwrap_or_else(PoisonError::into_inner);
    // Left over when no lab could be booted.
    for queue in [queue, smp] {
        for program in queue.into_inner().unwrap_or_else(PoisonError::into_inner) {
            total.add(&Tally::failure(format!("{} (not run: there was no lab)", program.name)));
        }
    }
    Ok(total)
}

/// What `mutex` guards. A thread that panicked with it left nothing half done: all is changed at once.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Programs that wait for a lab.
type Queue = Mutex<VecDeque<TestProgram>>;

/// What all labs share.
struct Labs<'a> {
    product: &'a Path,
    total: Mutex<Tally>,
}

impl Labs<'_> {
    /// Takes programs from `queue` and runs them in one lab after the other: the next one when a
    /// lab was lost, which fails the program that ran in it.
    fn work(&self, options: &lab::Options, queue: &Queue) {
        let mut site: Option<Site> = None;
        loop {
            if lock(queue).is_empty() {
                return;
            }
            let ready = match site.take().map_or_else(|| self.boot(options), Ok) {
                Ok(ready) => ready,
                Err(error) => {
                    say(format!("no lab for the end-to-end tests: {error:#}"));
                    return;
                }
            };
            let next = lock(queue).pop_front();
            let Some(program) = next else { return };
            let what = format!("end-to-end tests in the lab: {}", program.name);
            let tally = match step(&what, || ready.run(&program, true)) {
                Ok(tally) => {
                    site = Some(ready);
                    tally
                }
                Err(error) => {
                    say(format!("the lab of {} is of no more use: {error:#}", program.name));
                    Tally::failure(format!("{} (its lab was lost)", program.name))
                }
            };
            lock(&self.total).add(&tally);
        }
    }

    fn boot(&self, options: &lab::Options) -> Result<Site> {
        Site::prepare(Place::Lab(Box::new(Lab::private(options)?)), self.product)
    }
}

/// A place with the product and room for the tests' files.
struct Site {
    place: Place,
    product: PathBuf,
}

impl Site {
    fn prepare(place: Place, product: &Path) -> Result<Self> {
        let product = place.bring(product)?;
        place.must(&["mkdir", "-p", SCRATCH])?;
        Ok(Self { place, product })
    }

    /// Runs one program. Its output is shown as it comes, or, if `whole`, when it has ended.
    fn run(&self, program: &TestProgram, whole: bool) -> Result<Tally> {
        let mut run = Run::here(vec![program.path.display().to_string()])?;
        run.argv.extend(program.filter.clone());
        // An emulated processor is slow, and tests have bounds; some run several sandboxes anyway.
        if matches!(self.place, Place::Lab(_)) {
            run.argv.push("--test-threads=1".to_owned());
        }
        run.cwd = "/".into();
        run.quiet_limit = Some(SILENCE);
        let mut run = run
            .env("ISOPOD_BIN_DIR", self.product.display().to_string())
            .env("ISOPOD_TEST_DIR", SCRATCH);
        if let Some((variable, tree)) = &program.tree {
            self.place.expose(std::slice::from_ref(tree))?;
            run = run.env(variable, lab::text(tree)?);
        }
        let mut output = Vec::new();
        let mut show = if whole { Show::Only(&mut output) } else { Show::Also(&mut output) };
        let ended = self.place.run(&run, Input::Nothing, &mut show);
        if whole {
            static TERMINAL: Mutex<()> = Mutex::new(());
            let _one = lock(&TERMINAL);
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
    /// Runs only tests whose names contain it.
    filter: Option<String>,
    /// The Debian tree that it needs, and the variable that tells it where that is.
    tree: Option<(&'static str, PathBuf)>,
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
    let name = message["target"]["name"].as_str()?.to_owned();
    Some(TestProgram { name, path, filter: None, tree: None })
}

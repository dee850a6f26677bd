//! The run in labs: a queue of programs and unit tests. The thread of each lab takes jobs from it.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result};

use super::choice::Choice;
use super::program::{Program, Programs};
use super::report::{Report, Row, Times};
use super::site::Site;
use super::unit;
use crate::lab::{self, Lab, LabOptions, Show};
use crate::progress::{say, step};
use crate::target::Target;

/// The test program that needs a machine with two processors.
const NEEDS_TWO_CPUS: &str = "smp";

/// Name of the unit tests in messages and in the report.
pub(super) const UNIT: &str = "unit tests";

/// A job in the queue.
#[derive(Debug)]
enum Job {
    /// Unit tests, on this machine beside the labs.
    Unit(Vec<Program>),
    /// A program for a lab of one processor.
    Usual(Program),
    /// A program for a separate lab of two processors.
    TwoCpus(Program),
}

impl Job {
    fn name(&self) -> &str {
        match self {
            Self::Unit(_) => UNIT,
            Self::Usual(program) | Self::TwoCpus(program) => &program.name,
        }
    }
}

/// Runs all programs in as many labs as this machine has processors and memory for.
pub(super) fn run(
    programs: Programs,
    product: &Path,
    choice: &Choice,
    times: &Times,
) -> Result<Report> {
    lab::prepare()?;
    let kernel = lab::kernel_name()?;
    let jobs = in_order(programs, times);
    let (count, options) = LabOptions::side_by_side(jobs.len());
    let labs = Labs {
        product,
        choice,
        kernel,
        options,
        queue: Mutex::new(jobs),
        rows: Mutex::new(Vec::new()),
        losses: Mutex::default(),
    };
    thread::scope(|scope| {
        for number in 1..=count {
            let labs = &labs;
            scope.spawn(move || labs.work(number));
        }
    });
    let mut rows = labs.rows.into_inner().unwrap_or_else(PoisonError::into_inner);
    // Jobs are left if no lab could be booted.
    let rest = labs.queue.into_inner().unwrap_or_else(PoisonError::into_inner);
    rows.extend(rest.iter().map(|job| Row::failure(job.name(), "not run: there was no lab")));
    Ok(Report(rows))
}

/// The jobs in the order of their start.
///
/// The unit tests are first: they need no lab. Longer programs come before shorter ones, or one lab
/// would still run a long program when the others are idle. Programs for two processors are last,
/// when few other programs need a processor.
fn in_order(programs: Programs, times: &Times) -> VecDeque<Job> {
    let mut queue = VecDeque::new();
    if !programs.unit.is_empty() {
        queue.push_back(Job::Unit(programs.unit));
    }
    let (two, mut usual): (Vec<_>, Vec<_>) =
        programs.e2e.into_iter().partition(|program| program.name == NEEDS_TWO_CPUS);
    // A part of a program takes part of its time.
    usual.sort_by_key(|program| {
        std::cmp::Reverse((program.filter.is_none(), times.expected(&program.name)))
    });
    queue.extend(usual.into_iter().map(Job::Usual));
    queue.extend(two.into_iter().map(Job::TwoCpus));
    queue
}

/// Locks `mutex`, even after a panic of another holder: each change under these locks is one call.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// State shared by the threads of all labs.
struct Labs<'a> {
    product: &'a Path,
    choice: &'a Choice,
    /// Name of the kernel of all labs, for proofs.
    kernel: String,
    options: LabOptions,
    queue: Mutex<VecDeque<Job>>,
    rows: Mutex<Vec<Row>>,
    /// Programs whose lab was lost and that have not ended since, each with the reason.
    losses: Mutex<BTreeMap<String, String>>,
}

impl Labs<'_> {
    /// Takes jobs from the queue and runs them in a lab, until the queue is empty.
    ///
    /// If the lab is lost, the program runs once more in a new lab, and the report says so. If a lab
    /// cannot be booted, the job goes back to the queue and this thread ends.
    fn work(&self, number: usize) {
        let mut site: Option<Site> = None;
        loop {
            let next = lock(&self.queue).pop_front();
            let Some(job) = next else { return };
            let (place, ran) = match &job {
                Job::Unit(programs) => ("here".to_owned(), self.unit(programs).map(Some)),
                Job::TwoCpus(program) => {
                    // Ends the lab of this thread: the new lab needs its memory.
                    site = None;
                    let options = LabOptions { cpus: 2, ..self.options.clone() };
                    let booted = self.boot(&options);
                    ("lab, 2 CPUs".to_owned(), booted.map(|lab| self.run(&lab, program).1))
                }
                Job::Usual(program) => {
                    let booted = site.take().map_or_else(|| self.boot(&self.options), Ok);
                    let ran = booted.map(|lab| {
                        let (useful, row) = self.run(&lab, program);
                        site = useful.then_some(lab);
                        row
                    });
                    (format!("lab {number}"), ran)
                }
            };
            match ran {
                Ok(Some(row)) => lock(&self.rows).push(Row { place, ..row }),
                Ok(None) => lock(&self.queue).push_front(job),
                Err(error) => {
                    say(format!("no lab for the end-to-end tests: {error:#}"));
                    lock(&self.queue).push_front(job);
                    return;
                }
            }
        }
    }

    /// Boots a lab with the product in it.
    fn boot(&self, options: &LabOptions) -> Result<Site> {
        Site::prepare(Target::Lab(Box::new(Lab::private(options)?)), self.product)
    }

    /// Runs a program. The first value is false if the lab was lost. Without a row the program has
    /// to run again.
    fn run(&self, site: &Site, program: &Program) -> (bool, Option<Row>) {
        let what = format!("end-to-end tests in the lab: {}", program.name);
        let began = Instant::now();
        match step(&what, || site.run(program, self.choice, &self.kernel)) {
            Ok(mut row) => {
                row.tally.losses = lock(&self.losses).remove(&program.name).into_iter().collect();
                (true, Some(row))
            }
            Err(error) => {
                let words = format!("the lab of {} was lost: {error:#}", program.name);
                say(&words);
                let why = words.lines().next().unwrap_or_default().to_owned();
                // An emulated machine may fail by itself. A test that destroys it does so again.
                if lock(&self.losses).insert(program.name.clone(), why.clone()).is_none() {
                    return (false, None);
                }
                let row = Row::failure(&program.name, &why);
                let tally = row.tally.with_detail(words);
                (false, Some(Row { took: began.elapsed(), tally, ..row }))
            }
        }
    }

    /// Runs the unit tests on this machine. Their output is shown at the end, in one piece.
    fn unit(&self, programs: &[Program]) -> Result<Row> {
        let mut output = Vec::new();
        let began = Instant::now();
        let tally = step(UNIT, || unit::run(programs, self.choice, &mut Show::Only(&mut output)));
        say(format!("output of the {UNIT}:"));
        let printed = Show::Through.stdout(&output).context("cannot write output");
        let mut row = match tally {
            Ok(tally) => {
                Row { name: UNIT.to_owned(), place: String::new(), took: began.elapsed(), tally }
            }
            Err(error) => Row::failure(UNIT, &format!("{error:#}")),
        };
        if let Err(error) = printed {
            row = Row::failure(UNIT, &format!("{error:#}"));
        }
        Ok(row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unit_tests_are_first_and_then_the_longest() {
        let program = |name: &str, filter: Option<&str>| Program {
            name: name.to_owned(),
            target: name.to_owned(),
            path: "/x".into(),
            dir: "/".into(),
            filter: filter.map(str::to_owned),
            tree: None,
        };
        let e2e = ["exec", "smp", "docker", "podman"].map(|name| program(name, None));
        let unit = vec![program("shim", None)];
        let programs = Programs { unit, e2e: e2e.to_vec() };
        let order = in_order(programs, &Times::default());
        let names: Vec<&str> = order.iter().map(Job::name).collect();
        assert_eq!(names, [UNIT, "podman", "docker", "exec", "smp"]);
    }
}

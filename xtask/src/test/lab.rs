//! The run in labs: programs and unit tests wait in one queue, from which each lab's thread takes the next.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result};

use super::Choice;
use super::program::{Program, Programs};
use super::report::{Report, Row, Times};
use super::site::Site;
use super::unit;
use crate::lab::{self, Lab, Show};
use crate::place::Place;
use crate::progress::{say, step};

/// The test program that needs a machine with two processors.
const NEEDS_TWO_CPUS: &str = "smp";

/// What the row of the unit tests is called.
pub(super) const UNIT: &str = "unit tests";

/// Something to run that waits in the queue.
#[derive(Debug)]
enum Job {
    /// Unit tests, on this machine beside the labs.
    Unit(Vec<Program>),
    /// A program for a lab of one processor.
    Usual(Program),
    /// A program for a lab of its own with two.
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

/// Runs everything in as many labs as this machine has processors and memory for.
pub(super) fn run(
    programs: Programs,
    product: &Path,
    choice: &Choice,
    times: &Times,
) -> Result<Report> {
    lab::prepare()?;
    let kernel = lab::kernel_name()?;
    let jobs = queue(programs, times);
    let (count, options) = lab::Options::side_by_side(jobs.len());
    let labs = Labs {
        product,
        choice,
        kernel,
        options,
        queue: Mutex::new(jobs),
        rows: Mutex::new(Vec::new()),
    };
    thread::scope(|scope| {
        for number in 1..=count {
            let labs = &labs;
            scope.spawn(move || labs.work(number));
        }
    });
    let mut rows = labs.rows.into_inner().unwrap_or_else(PoisonError::into_inner);
    // Left over when no lab could be booted.
    let rest = labs.queue.into_inner().unwrap_or_else(PoisonError::into_inner);
    rows.extend(rest.iter().map(|job| Row::failure(job.name(), "not run: there was no lab")));
    Ok(Report(rows))
}

/// The jobs in the order in which they begin. First the unit tests, which need no lab; then the longest, lest
/// one lab be busy with it while the others are idle; at the end those that need two processors, when little
/// else wants these.
fn queue(programs: Programs, times: &Times) -> VecDeque<Job> {
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

/// What `mutex` guards. A thread that panicked with it left nothing half done: all is changed at once.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What all labs share.
struct Labs<'a> {
    product: &'a Path,
    choice: &'a Choice,
    /// Names the kernel of all labs.
    kernel: String,
    options: lab::Options,
    queue: Mutex<VecDeque<Job>>,
    rows: Mutex<Vec<Row>>,
}

impl Labs<'_> {
    /// Takes jobs from the queue and runs them, in one lab after the other: the next one when a lab was
    /// lost, which fails the program that ran in it.
    fn work(&self, number: usize) {
        let mut site: Option<Site> = None;
        loop {
            let next = lock(&self.queue).pop_front();
            let Some(job) = next else { return };
            let (place, row) = match &job {
                Job::Unit(programs) => ("here".to_owned(), self.unit(programs)),
                Job::TwoCpus(program) => {
                    // Its memory is needed.
                    site = None;
                    let options = lab::Options { cpus: 2, ..self.options.clone() };
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
            match row {
                Ok(row) => lock(&self.rows).push(Row { place, ..row }),
                Err(error) => {
                    say(format!("no lab for the end-to-end tests: {error:#}"));
                    lock(&self.queue).push_front(job);
                    return;
                }
            }
        }
    }

    fn boot(&self, options: &lab::Options) -> Result<Site> {
        Site::prepare(Place::Lab(Box::new(Lab::private(options)?)), self.product)
    }

    /// Runs a program, and says whether the lab is of use after it.
    fn run(&self, site: &Site, program: &Program) -> (bool, Row) {
        let what = format!("end-to-end tests in the lab: {}", program.name);
        let began = Instant::now();
        match step(&what, || site.run(program, self.choice, &self.kernel)) {
            Ok(row) => (true, row),
            Err(error) => {
                say(format!("the lab of {} is of no more use: {error:#}", program.name));
                let row = Row::failure(&program.name, "its lab was lost");
                (false, Row { took: began.elapsed(), ..row })
            }
        }
    }

    fn unit(&self, programs: &[Program]) -> Result<Row> {
        let mut output = Vec::new();
        let began = Instant::now();
        let tally = step(UNIT, || unit::run(programs, self.choice, &mut Show::Only(&mut output)));
        say(format!("what {UNIT} printed:"));
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
            path: "/x".into(),
            dir: "/".into(),
            filter: filter.map(str::to_owned),
            tree: None,
        };
        let e2e = ["exec", "smp", "docker", "podman"].map(|name| program(name, None));
        let unit = vec![program("shim", None)];
        let programs = Programs { unit, e2e: e2e.to_vec() };
        let order = queue(programs, &Times::default());
        let names: Vec<&str> = order.iter().map(Job::name).collect();
        assert_eq!(names, [UNIT, "podman", "docker", "exec", "smp"]);
    }
}

//! `cargo xtask test`: the unit tests, and the end-to-end tests against the built product.

mod e2e;
mod lab;
mod needs;
mod program;
mod proof;
mod report;
mod site;
mod tally;
mod tree;
mod unit;

use std::path::PathBuf;
use std::thread;
use std::time::Instant;

use anyhow::{Result, bail};
use lexopt::prelude::*;

use self::program::Programs;
use self::report::{Report, Row};
use crate::apt::{self, Need};
use crate::build;
use crate::dependencies::Dependencies;
use crate::place;
use crate::process::joined;
use crate::progress::{say, seconds, step};

const HELP: &str = "\
Usage: cargo xtask test [--unit | --e2e] [--proofs] [FILTER]

  FILTER    only tests whose names contain it; all tests of an end-to-end program of this very name
            (`stdio` for tests/tests/stdio.rs)
            docker, docker_newer, podman, workloads, `runc::` and `isopod::`: tests of container
            engines, which run without FILTER too
  --unit    only the unit tests
  --e2e     only the end-to-end tests
  --proofs  also the cases of engines that runc has proven in an earlier run

The end-to-end tests run on this machine if it has hardware KVM, and else in labs that are booted for
them and end with them. ISOPOD_LAB=force or ISOPOD_LAB=off decides otherwise.

A case of an engine runs with runc, which proves it, and then with Isopod. A proof is remembered in the
cache until the case, the harness, a package that it needs or the kernel changes.";

/// Which tests to run.
#[derive(Debug, Clone)]
struct Choice {
    unit: bool,
    e2e: bool,
    /// Proves again what is proven.
    proofs: bool,
    filter: Option<String>,
}

impl Choice {
    /// Whether proofs of earlier runs count: not when somebody asks for cases with runc.
    fn remembers(&self) -> bool {
        !self.proofs && !self.filter.as_deref().is_some_and(|filter| filter.contains("runc::"))
    }
}

/// The Debian tree of the tests of workloads, with a compiler.
pub(crate) fn workload_tree() -> Result<PathBuf> {
    apt::ensure([needs::DEBOOTSTRAP])?;
    tree::WORKLOADS.ensure()
}

/// Runs the tests; the exit status is 0 when all of them pass.
pub(crate) fn main(mut args: lexopt::Parser) -> Result<i32> {
    let began = Instant::now();
    let mut choice = Choice { unit: true, e2e: true, proofs: false, filter: None };
    while let Some(arg) = args.next()? {
        match arg {
            Long("help") | Short('h') => {
                println!("{HELP}");
                return Ok(0);
            }
            Long("unit") => choice.e2e = false,
            Long("e2e") => choice.unit = false,
            Long("proofs") => choice.proofs = true,
            Value(word) if choice.filter.is_none() => choice.filter = Some(word.string()?),
            _ => return Err(arg.unexpected().into()),
        }
    }
    if !choice.unit && !choice.e2e {
        bail!("--unit and --e2e leave nothing to test");
    }
    let later = run_packages(&choice)?;
    // Fails for users who may not install, and names all missing packages to them.
    apt::missing(build::needs().chain(later.iter().copied()))?;
    apt::ensure(build::needs())?;
    let report = run(&choice, &later);
    let total = report.total();
    total.details().iter().for_each(|detail| println!("\n{detail}"));
    println!("\n{report}\nall tests, {}:\n{total}", seconds(began));
    if total.is_empty() {
        match choice.filter {
            Some(filter) => bail!(
                "no test's name contains `{filter}`, and no end-to-end program is called so; \
                 `cargo xtask test` without it runs all"
            ),
            None => bail!("no test was run"),
        }
    }
    Ok(i32::from(!total.passed_all()))
}

/// The Debian packages for running the tests, without those for compiling them.
fn run_packages(choice: &Choice) -> Result<Vec<Need>> {
    if !choice.e2e {
        return Ok(Vec::new());
    }
    let mut packages = place::needs(false)?;
    packages.extend(needs::NEEDS);
    if program::needs_engines(choice.filter.as_deref()) {
        packages.extend(needs::ENGINES);
    }
    Ok(packages)
}

/// Prepares and runs what `choice` is about. What could not be run to its end counts as failed, and does
/// not keep the rest from being told.
fn run(choice: &Choice, packages: &[Need]) -> Report {
    let (programs, product) = match prepare(choice, packages) {
        Ok(prepared) => prepared,
        Err(error) => return failed("tests", &error),
    };
    let result = match product {
        None => e2e::run_unit(&programs, choice),
        Some(Err(error)) => {
            let mut report = failed("end-to-end tests", &error);
            let unit = e2e::run_unit(&programs, choice);
            report.0.extend(unit.unwrap_or_else(|error| failed(lab::UNIT, &error)).0);
            return report;
        }
        Some(Ok((product, in_lab))) => e2e::run(programs, &product, choice, in_lab),
    };
    result.unwrap_or_else(|error| failed("tests", &error))
}

fn failed(what: &str, error: &anyhow::Error) -> Report {
    eprintln!("error: {error:#}");
    Report(vec![Row::failure(what, "not run to the end")])
}

/// The compiled tests, and where they need it the folder of the product and whether they run in labs.
type Prepared = (Programs, Option<Result<(PathBuf, bool)>>);

/// Compiles tests and product, installs `packages` and fetches the rest, all at the same time: each of them
/// has parts that keep one processor busy only, or none. Compiled crates of others are kept for the next
/// checkout.
fn prepare(choice: &Choice, packages: &[Need]) -> Result<Prepared> {
    let in_lab = choice.e2e && !place::is_here(false)?;
    let filter = choice.filter.as_deref();
    let dependencies = Dependencies::of_checkout().and_then(|all| all.take().map(|()| all));
    if let Err(error) = &dependencies {
        say(format!("all crates are compiled here: {error:#}"));
    }
    let prepared = thread::scope(|scope| {
        let product = choice.e2e.then(|| scope.spawn(e2e::build));
        let fetched = choice.e2e.then(|| {
            scope.spawn(move || {
                apt::ensure(packages.iter().copied())?;
                e2e::fetch(filter, in_lab)
            })
        });
        let programs = step("compile the tests", || program::compile(choice));
        let fetched = fetched.map_or(Ok(()), joined);
        let product = product.map(joined);
        let ready = product.map(|product| fetched.and(product).map(|product| (product, in_lab)));
        Ok((programs?, ready))
    });
    // Without a part of them, there is not all that the next run needs.
    let whole = choice.unit && matches!(prepared, Ok((_, Some(Ok(_)))));
    if whole
        && let Ok(dependencies) = &dependencies
        && let Err(error) = dependencies.keep()
    {
        say(format!("the next checkout has to compile all crates: {error:#}"));
    }
    prepared
}

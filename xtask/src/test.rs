//! `cargo xtask test`: the unit tests, and the end-to-end tests against the built product.

mod choice;
mod e2e;
mod needs;
mod program;
mod proof;
mod queue;
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

use self::choice::Choice;
use self::program::Programs;
use self::report::{Report, Row};
use crate::apt::{self, Need};
use crate::build;
use crate::dependencies::Dependencies;
use crate::process::joined;
use crate::progress::{say, seconds, step};
use crate::target;

const HELP: &str = "\
Usage: cargo xtask test [--unit | --e2e] [--proofs] [FILTER]
       cargo xtask test --record-proofs

  FILTER    only tests whose names contain FILTER; all tests of an end-to-end program if FILTER is
            its name (`stdio` for tests/tests/stdio.rs)
            docker, docker_newer, podman, containerd, containerd_older, containerd_newer,
            workloads, `runc::` and `isopod::`: tests of container engines; other filters leave
            these tests out
  --unit    only the unit tests
  --e2e     only the end-to-end tests
  --proofs  also the cases of engines that runc has proven in an earlier run
  --record-proofs
            runs nothing, and writes to tests/proofs.txt which cases runc has proven in labs

The end-to-end tests run on this machine if it has hardware KVM. Otherwise they run in labs, which
are booted for the tests and end with them. ISOPOD_LAB=force always uses labs, ISOPOD_LAB=off never.

A case of an engine runs with runc first, which proves the case, and then with Isopod. The cache and
tests/proofs.txt keep a proof. It holds until the case, the harness, a package that the case needs,
or the kernel changes.";

/// The Debian tree of the workload tests. It has a compiler.
pub(crate) fn workload_tree() -> Result<PathBuf> {
    apt::ensure([needs::DEBOOTSTRAP])?;
    tree::WORKLOADS.ensure()
}

/// Runs the tests. Returns the exit status: 0 if all tests pass.
pub(crate) fn main(mut args: lexopt::Parser) -> Result<i32> {
    let began = Instant::now();
    let mut choice = Choice { unit: true, e2e: true, proofs: false, record: false, filter: None };
    while let Some(arg) = args.next()? {
        match arg {
            Long("help") | Short('h') => {
                println!("{HELP}");
                return Ok(0);
            }
            Long("unit") => choice.e2e = false,
            Long("e2e") => choice.unit = false,
            Long("proofs") => choice.proofs = true,
            Long("record-proofs") => (choice.record, choice.unit) = (true, false),
            Value(word) if choice.filter.is_none() => choice.filter = Some(word.string()?),
            _ => return Err(arg.unexpected().into()),
        }
    }
    if !choice.unit && !choice.e2e {
        bail!("--unit and --e2e leave nothing to test");
    }
    let later = run_packages(&choice)?;
    // Before anything is installed: the error for users other than root names all missing packages.
    let compile = || build::needs().chain(needs::COMPILE.filter(|_| choice.e2e));
    apt::missing(compile().chain(later.iter().copied()))?;
    apt::ensure(compile())?;
    if choice.record {
        apt::ensure(later)?;
        let programs = step("compile the tests", || program::compile(&choice))?;
        say(format!("recorded: {} proofs", e2e::record_proofs(programs)?));
        return Ok(0);
    }
    let report = run(&choice, &later);
    let total = report.total();
    total.details().iter().for_each(|detail| println!("\n{detail}"));
    println!("\n{report}\nall tests, {}:\n{total}", seconds(began));
    if total.is_empty() {
        match choice.filter {
            Some(filter) => bail!(
                "no test has `{filter}` in its name, and no end-to-end program is called \
                 `{filter}`; `cargo xtask test` without a filter runs all tests"
            ),
            None => bail!("no test was run"),
        }
    }
    Ok(i32::from(!total.passed_all()))
}

/// Debian packages for running the tests, without those for compiling.
fn run_packages(choice: &Choice) -> Result<Vec<Need>> {
    if !choice.e2e {
        return Ok(Vec::new());
    }
    let mut packages = target::needs(false)?;
    packages.extend(needs::NEEDS);
    if program::needs_engines(choice.filter.as_deref()) {
        packages.extend(needs::ENGINES);
    }
    Ok(packages)
}

/// Prepares and runs the tests of `choice`.
///
/// An error becomes a failed row of the report, so the results of other tests are still reported.
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
            report.0.extend(unit.unwrap_or_else(|error| failed(queue::UNIT, &error)).0);
            return report;
        }
        Some(Ok((product, in_lab))) => e2e::run(programs, &product, choice, in_lab),
    };
    result.unwrap_or_else(|error| failed("tests", &error))
}

/// Prints an error. Returns a report with a failed row for `what`.
fn failed(what: &str, error: &anyhow::Error) -> Report {
    eprintln!("error: {error:#}");
    Report(vec![Row::failure(what, "not run to the end")])
}

/// The compiled tests; for end-to-end tests also the folder of the product, and true for labs.
type Prepared = (Programs, Option<Result<(PathBuf, bool)>>);

/// Compiles tests and product, installs `packages`, and fetches kernel and trees, all in parallel.
///
/// Each of these has parts that use one processor or none. The cache keeps compiled dependencies
/// for the next checkout.
fn prepare(choice: &Choice, packages: &[Need]) -> Result<Prepared> {
    let in_lab = choice.e2e && !target::is_here(false)?;
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
    // A part of the crates would be kept as if it were complete, so only a whole build is kept.
    let whole = choice.unit && matches!(prepared, Ok((_, Some(Ok(_)))));
    if whole
        && let Ok(dependencies) = &dependencies
        && let Err(error) = dependencies.keep()
    {
        say(format!("the next checkout has to compile all crates: {error:#}"));
    }
    prepared
}

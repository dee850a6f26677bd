//! `cargo xtask test`: the unit tests, then the end-to-end tests against the built product.

mod e2e;
mod needs;
mod tally;
mod tree;

use std::time::Instant;

use anyhow::{Result, bail};
use lexopt::prelude::*;

use self::tally::Tally;
use crate::apt;
use crate::build;
use crate::lab::{Input, Run, Show};
use crate::place::{self, Place};
use crate::progress::{seconds, step};
use crate::repository;

const HELP: &str = "\
Usage: cargo xtask test [--unit | --e2e] [FILTER]

  FILTER    only tests whose names contain it; all tests of an end-to-end program of this very name
            (`stdio` for tests/tests/stdio.rs)
            docker, docker_newer, podman, workloads, `runc::` and `isopod::`: tests of container
            engines, which run without FILTER too
  --unit    only the unit tests
  --e2e     only the end-to-end tests

The end-to-end tests run on this machine if it has hardware KVM, and else in labs that are booted for
them and end with them. ISOPOD_LAB=force or ISOPOD_LAB=off decides otherwise.";

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
    let lab = if e2e { place::needs(false)? } else { Vec::new() };
    let mut programs = Vec::new();
    if e2e {
        programs.extend(needs::NEEDS);
        if e2e::needs_engines(filter.as_deref()) {
            programs.extend(needs::ENGINES);
        }
    }
    apt::ensure(build::needs().chain(lab).chain(programs))?;
    let mut total = Tally::default();
    if unit {
        total.add(&or_failure("unit tests", unit_tests(filter.as_deref())));
    }
    if e2e {
        total.add(&or_failure("end-to-end tests", e2e::run(filter.as_deref())));
    }
    println!("\nall tests, {}:\n{total}", seconds(began));
    if total.is_empty() {
        match filter {
            Some(filter) => bail!(
                "no test's name contains `{filter}`, and no end-to-end program is called so; \
                 `cargo xtask test` without it runs all"
            ),
            None => bail!("no test was run"),
        }
    }
    Ok(i32::from(!total.passed_all()))
}

/// What could not be run to its end counts as failed, and does not keep the rest from being told.
fn or_failure(what: &str, tally: Result<Tally>) -> Tally {
    tally.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        Tally::failure(format!("{what} (not run to the end)"))
    })
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

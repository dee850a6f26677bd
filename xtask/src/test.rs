//! `cargo xtask test`: the unit tests, then the end-to-end tests against the built product.

mod e2e;
mod tally;

use std::time::Instant;

use anyhow::{Result, bail};
use lexopt::prelude::*;

use self::tally::Tally;
use crate::apt;
use crate::build;
use crate::lab::{self, Input, Run, Show};
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
        total.add(&e2e::run(filter.as_deref())?);
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

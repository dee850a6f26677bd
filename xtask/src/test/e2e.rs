//! The end-to-end tests: product, Debian trees, and the run of all programs.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::choice::Choice;
use super::program::{Program, Programs};
use super::proof;
use super::queue::{self, UNIT};
use super::report::{Report, Row, Times};
use super::site::{SCRATCH, Site};
use super::tree::{TREES, Tree};
use super::unit;
use crate::build;
use crate::lab::{self, Show};
use crate::progress::step;
use crate::target::Target;

/// Builds the product and the probe. Returns the folder with both.
pub(super) fn build() -> Result<PathBuf> {
    let product = build::build()?;
    let probe = step("compile the tests' probe", || build::compile(&["isopod-tests"]))?;
    build::place(&probe.join("isopod-probe"), &product.join("isopod-probe"))?;
    Ok(product)
}

/// Fetches the lab's kernel, and the trees of all programs or of the program named by `filter`.
///
/// Neither needs anything of this checkout, so builds can run meanwhile.
pub(super) fn fetch(filter: Option<&str>, in_lab: bool) -> Result<()> {
    if in_lab {
        lab::prepare()?;
    }
    let named = |tree: &&Tree| filter.is_none_or(|filter| tree.is_for(filter));
    TREES.iter().filter(named).try_for_each(|tree| tree.ensure().map(drop))
}

/// Gives programs their trees. Trees are made before a lab boots; see [`crate::lab`].
fn give_trees(programs: &mut [Program]) -> Result<()> {
    for program in programs {
        if let Some(tree) = TREES.iter().find(|tree| tree.is_for(&program.name)) {
            program.tree = Some((tree.variable, tree.ensure()?));
        }
    }
    Ok(())
}

/// Runs all programs.
///
/// In labs, the times of programs without a filter are kept for the order of the next run.
pub(super) fn run(
    mut programs: Programs,
    product: &Path,
    choice: &Choice,
    in_lab: bool,
) -> Result<Report> {
    give_trees(&mut programs.e2e)?;
    if !in_lab {
        return run_here(&programs, product, choice);
    }
    let whole: Vec<String> = programs
        .e2e
        .iter()
        .filter(|program| program.filter.is_none())
        .map(|program| program.name.clone())
        .collect();
    let times = Times::load();
    let report = queue::run(programs, product, choice, &times)?;
    times.keep(report.0.iter().filter(|row| whole.contains(&row.name)));
    Ok(report)
}

/// Writes the proofs that hold in labs to the repository. Returns their number.
pub(super) fn record_proofs(mut programs: Programs) -> Result<usize> {
    lab::prepare()?;
    give_trees(&mut programs.e2e)?;
    proof::record(&programs.e2e, &lab::kernel_name()?)
}

/// Runs all programs on this machine, one after the other.
fn run_here(programs: &Programs, product: &Path, choice: &Choice) -> Result<Report> {
    let mut report = run_unit(programs, choice)?;
    let kernel = proof::own_kernel()?;
    let site = Site::prepare(Target::Here, product)?;
    for program in &programs.e2e {
        let what = format!("end-to-end tests: {}", program.name);
        report.0.push(step(&what, || site.run(program, choice, &kernel))?);
    }
    // Fails if a test left files there. That test has reported them.
    let _ = std::fs::remove_dir(SCRATCH);
    Ok(report)
}

/// Runs the unit tests alone.
pub(super) fn run_unit(programs: &Programs, choice: &Choice) -> Result<Report> {
    if programs.unit.is_empty() {
        return Ok(Report::default());
    }
    let began = std::time::Instant::now();
    let tally = step(UNIT, || unit::run(&programs.unit, choice, &mut Show::Through))?;
    let place = Target::Here.name().to_owned();
    Ok(Report(vec![Row { name: UNIT.to_owned(), place, took: began.elapsed(), tally }]))
}

//! A place with the product in it, where end-to-end programs run one after the other.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::Choice;
use super::program::Program;
use super::proof::{self, Proofs};
use super::report::Row;
use super::tally::Tally;
use crate::lab::{self, Ended, Input, Run, Show};
use crate::place::Place;
use crate::timed::Timed;

/// How long a test program may print nothing.
const SILENCE: Duration = Duration::from_secs(15 * 60);

/// Where the tests make their files.
pub(super) const SCRATCH: &str = "/tmp/isopod-tests";

/// A place with the product and room for the tests' files.
pub(super) struct Site {
    place: Place,
    product: PathBuf,
}

impl Site {
    /// Brings the product there.
    pub(super) fn prepare(place: Place, product: &Path) -> Result<Self> {
        let product = place.bring(product)?;
        place.must(&["mkdir", "-p", SCRATCH])?;
        Ok(Self { place, product })
    }

    /// Runs one program. Its output is shown as it comes: line by line in a lab, where others run beside it.
    /// `kernel` names the kernel of the place.
    ///
    /// # Errors
    ///
    /// If the place is lost, or output cannot be written.
    pub(super) fn run(&self, program: &Program, choice: &Choice, kernel: &str) -> Result<Row> {
        let mut run = self.command(program)?;
        let mut proofs = None;
        if program.is_engine() {
            let tree = program.tree.as_ref().map(|(_, tree)| tree.as_path());
            let known = Proofs::of(&program.name, tree, kernel)?;
            if choice.remembers() {
                let remembered = known.remembered(&program.tests()?)?;
                run = run.env(proof::VARIABLE, remembered.join(" "));
            }
            proofs = Some(known);
        }
        if let Some((variable, tree)) = &program.tree {
            self.place.expose(std::slice::from_ref(tree))?;
            run = run.env(variable, lab::text(tree)?);
        }
        let began = Instant::now();
        let (output, ended) = self.output(program, &run)?;
        if let Some(proofs) = proofs {
            proofs.learn(&output);
        }
        let tally = Tally::of(&program.name, &output, &ended);
        let place = self.place.name().to_owned();
        Ok(Row { name: program.name.clone(), place, took: began.elapsed(), tally })
    }

    fn command(&self, program: &Program) -> Result<Run> {
        let mut run = Run::here(vec![program.path.display().to_string()])?;
        run.argv.extend(program.filter.clone());
        // An emulated processor is slow, and tests have bounds; some run several sandboxes anyway.
        if matches!(self.place, Place::Lab(_)) {
            run.argv.push("--test-threads=1".to_owned());
        }
        run.cwd = "/".into();
        run.quiet_limit = Some(SILENCE);
        Ok(run
            .env("ISOPOD_BIN_DIR", self.product.display().to_string())
            .env("ISOPOD_TEST_DIR", SCRATCH)
            .env(proof::VARIABLE, ""))
    }

    fn output(&self, program: &Program, run: &Run) -> Result<(Vec<u8>, Ended)> {
        if let Place::Here = self.place {
            let mut output = Vec::new();
            let ended = self.place.run(run, Input::Nothing, &mut Show::Also(&mut output))?;
            return Ok((output, ended));
        }
        let mut output = Timed::new(&program.name);
        let ended = self.place.run(run, Input::Nothing, &mut Show::Timed(&mut output));
        Ok((output.finish().context("cannot write output")?, ended?))
    }
}

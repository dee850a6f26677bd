//! A machine with the product, on which end-to-end programs run one after the other.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::choice::Choice;
use super::program::Program;
use super::proof::{self, Proofs};
use super::report::Row;
use super::tally::Tally;
use crate::lab::{self, Ended, Input, Run, Show};
use crate::target::Target;
use crate::timed::Timed;

/// Longest time without output of a test program, in a lab.
const SILENCE: Duration = Duration::from_secs(15 * 60);

/// Directory of the tests' files.
pub(super) const SCRATCH: &str = "/tmp/isopod-tests";

/// A machine with the product and the directory [`SCRATCH`].
pub(super) struct Site {
    target: Target,
    product: PathBuf,
}

impl Site {
    /// Copies the product to the machine, if needed, and makes [`SCRATCH`].
    pub(super) fn prepare(target: Target, product: &Path) -> Result<Self> {
        let product = target.bring(product)?;
        target.must(&["mkdir", "-p", SCRATCH])?;
        Ok(Self { target, product })
    }

    /// Runs one program and shows its output at once. `kernel` is the name of the kernel.
    ///
    /// In a lab the output is shown line by line, because other labs show theirs at the same time.
    /// A failed program is no error.
    pub(super) fn run(&self, program: &Program, choice: &Choice, kernel: &str) -> Result<Row> {
        let mut run = self.command(program)?;
        let mut proofs = None;
        if program.is_engine() {
            let tree = program.tree.as_ref().map(|(_, tree)| tree.as_path());
            let known = Proofs::of(&program.target, tree, kernel)?;
            if choice.remembers() {
                let remembered = known.remembered(&program.tests()?)?;
                run = run.env(proof::VARIABLE, remembered.join(" "));
            }
            proofs = Some(known);
        }
        if let Some((variable, tree)) = &program.tree {
            self.target.expose(std::slice::from_ref(tree))?;
            run = run.env(variable, lab::text(tree)?);
        }
        let began = Instant::now();
        let (output, ended) = self.output(program, &run)?;
        if let Some(proofs) = proofs {
            proofs.learn(&output);
        }
        let tally = Tally::of(&program.name, &output, &ended);
        let place = self.target.name().to_owned();
        Ok(Row { name: program.name.clone(), place, took: began.elapsed(), tally })
    }

    /// The command that runs a program.
    fn command(&self, program: &Program) -> Result<Run> {
        let mut run = Run::here(vec![program.path.display().to_string()])?;
        run.argv.extend(program.filter.clone());
        // One test at a time: an emulated processor is slow, and tests have time limits.
        if matches!(self.target, Target::Lab(_)) {
            run.argv.push("--test-threads=1".to_owned());
        }
        run.cwd = "/".into();
        run.quiet_limit = Some(SILENCE);
        let (variable, version) = program.version();
        Ok(run
            .env(variable, version)
            .env("ISOPOD_BIN_DIR", self.product.display().to_string())
            .env("ISOPOD_TEST_DIR", SCRATCH)
            .env(proof::VARIABLE, ""))
    }

    /// Runs a command. Returns its output, which is shown too, and its end.
    fn output(&self, program: &Program, run: &Run) -> Result<(Vec<u8>, Ended)> {
        if let Target::Here = self.target {
            let mut output = Vec::new();
            let ended = self.target.run(run, Input::Nothing, &mut Show::Also(&mut output))?;
            return Ok((output, ended));
        }
        let mut output = Timed::new(&program.name);
        let ended = self.target.run(run, Input::Nothing, &mut Show::Timed(&mut output));
        Ok((output.finish().context("cannot write output")?, ended?))
    }
}

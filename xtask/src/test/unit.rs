//! The unit tests: first the test programs of all crates, then the examples in doc comments.

use anyhow::Result;

use super::choice::Choice;
use super::program::{Program, selection};
use super::tally::Tally;
use crate::lab::{Ended, Input, Run, Show};
use crate::repository;
use crate::target::Target;

/// Runs the unit tests on this machine. A failed program does not stop the others.
pub(super) fn run(programs: &[Program], choice: &Choice, show: &mut Show<'_>) -> Result<Tally> {
    let mut total = Tally::default();
    for program in programs {
        let mut run = Run::here(vec![program.path.display().to_string()])?;
        run.argv.extend(choice.filter.clone());
        // Working directory and variable are those that cargo sets.
        run.cwd = program.dir.clone();
        let run = run.env("CARGO_MANIFEST_DIR", program.dir.display().to_string());
        let what = format!("\n     Running {} ({})\n", program.name, program.dir.display());
        show.stdout(what.as_bytes())?;
        let (output, ended) = captured(&run, show)?;
        total.add(&Tally::of(&format!("unit tests of {}", program.name), &output, &ended));
    }
    let mut words = vec!["cargo", "test", "--quiet", "--doc", "--no-fail-fast"];
    words.extend(selection(choice));
    words.extend(choice.filter.as_deref());
    let mut run = Run::here(words.into_iter().map(str::to_owned).collect())?;
    run.cwd = repository::root().to_owned();
    let (output, ended) = captured(&run, show)?;
    total.add(&Tally::of("examples in docs", &output, &ended));
    Ok(total)
}

/// Runs a program. Returns its output, which is shown too, and its end.
fn captured(run: &Run, show: &mut Show<'_>) -> Result<(Vec<u8>, Ended)> {
    let mut output = Vec::new();
    let ended = match show {
        Show::Through | Show::Also(_) => {
            Target::Here.run(run, Input::Nothing, &mut Show::Also(&mut output))?
        }
        Show::Only(_) | Show::Timed(_) => {
            let ended = Target::Here.run(run, Input::Nothing, &mut Show::Only(&mut output))?;
            show.stdout(&output)?;
            ended
        }
    };
    Ok((output, ended))
}

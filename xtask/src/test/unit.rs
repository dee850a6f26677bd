//! The unit tests: the test programs of all crates one after the other, then the examples in their docs.

use anyhow::Result;

use super::Choice;
use super::program::{Program, selection};
use super::tally::Tally;
use crate::lab::{Ended, Input, Run, Show};
use crate::place::Place;
use crate::repository;

/// Runs the unit tests on this machine. Each program runs whatever became of those before it.
pub(super) fn run(programs: &[Program], choice: &Choice, show: &mut Show<'_>) -> Result<Tally> {
    let mut total = Tally::default();
    for program in programs {
        let mut run = Run::here(vec![program.path.display().to_string()])?;
        run.argv.extend(choice.filter.clone());
        // As cargo has them.
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

/// Runs a program; its output is shown as well.
fn captured(run: &Run, show: &mut Show<'_>) -> Result<(Vec<u8>, Ended)> {
    let mut output = Vec::new();
    let ended = match show {
        Show::Through | Show::Also(_) => {
            Place::Here.run(run, Input::Nothing, &mut Show::Also(&mut output))?
        }
        Show::Only(_) | Show::Timed(_) => {
            let ended = Place::Here.run(run, Input::Nothing, &mut Show::Only(&mut output))?;
            show.stdout(&output)?;
            ended
        }
    };
    Ok((output, ended))
}

//! `cargo xtask lab`.

use anyhow::{Result, bail};
use lexopt::prelude::*;

use super::{Lab, Options, Run, Show, background};
use crate::place::own_input;
use crate::progress::say;

const HELP: &str = "\
Usage: cargo xtask lab up [OPTIONS]             boot a lab and leave it in the background
       cargo xtask lab run [--] COMMAND...      run a command in it, with this terminal's streams
       cargo xtask lab once [OPTIONS] [--] COMMAND...
                                                boot a lab for one command only
       cargo xtask lab status                   say whether it runs
       cargo xtask lab down                     end it

Options:
  --count          guest time is instructions executed (1 ms = a million), on one processor
  --cpus N         processors [1]; QEMU is not exact when it emulates several
  --memory MIB     memory [half of this machine's, 8192 at most]

The lab sees this machine's files as they are when it first looks, and cargo's target directory as
it changes. It writes to nothing but that directory; the rest of what it writes ends with it. /tmp, /run
and /var/tmp are its own; this machine's are below /run/host.";

/// Runs the command line after `lab` and returns the exit status to give.
pub(crate) fn main(mut args: lexopt::Parser) -> Result<i32> {
    let mut options = Options::default();
    let mut verb: Option<String> = None;
    let mut argv: Vec<String> = Vec::new();
    while let Some(arg) = args.next()? {
        match arg {
            Long("help") | Short('h') => {
                println!("{HELP}");
                return Ok(0);
            }
            Long("count") => options.count = true,
            Long("cpus") => options.cpus = args.value()?.parse()?,
            Long("memory") => options.memory_mib = args.value()?.parse()?,
            Value(word) if verb.is_none() => verb = Some(word.string()?),
            Value(word) => {
                // All that follows the command belongs to it.
                argv.push(word.string()?);
                for rest in args.raw_args()? {
                    argv.push(rest.string()?);
                }
            }
            _ => return Err(arg.unexpected().into()),
        }
    }
    let verb = verb.unwrap_or_default();
    if argv.is_empty() == matches!(verb.as_str(), "run" | "once") {
        bail!("a command is needed after `run` and `once` and nowhere else\n{HELP}");
    }
    match verb.as_str() {
        "up" => background::up(&options).map(|()| 0),
        "hold" => background::hold(&options).map(|()| 0),
        "down" => background::down().map(|()| 0),
        "status" => background::status(),
        "run" => ended(&background::run(&Run::here(argv)?, own_input())?),
        "once" => {
            let lab = Lab::private(&options)?;
            ended(&lab.run(&Run::here(argv)?, own_input(), &mut Show::Through)?)
        }
        _ => bail!("which of them: up, run, once, status or down?\n{HELP}"),
    }
}

fn ended(ended: &super::Ended) -> Result<i32> {
    if let super::Ended::Refused(why) = ended {
        say(format!("the lab: {why}"));
    }
    Ok(ended.status())
}

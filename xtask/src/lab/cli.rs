//! `cargo xtask lab`: labs for developers.

use anyhow::{Result, bail};
use lexopt::prelude::*;

use super::{Input, Lab, LabOptions, Run, Show, background};
use crate::progress::say;

const HELP: &str = "\
Usage: cargo xtask lab up [OPTIONS]             boot a lab and leave it in the background
       cargo xtask lab run [--] COMMAND...      run a command in the background lab, with this
                                                process's streams
       cargo xtask lab once [OPTIONS] [--] COMMAND...
                                                boot a lab for one command only
       cargo xtask lab status                   print the state of the background lab
       cargo xtask lab down                     end the background lab

Options:
  --count          count instructions: a million take 1 ms of guest time; one processor
  --cpus N         processors [1]; QEMU's emulation of several is not exact
  --memory MIB     memory [half of this machine's, 2048 at least, 8192 at most]

`cargo xtask build` and `cargo xtask demo` put isopod into target/isopod of the checkout:

  cargo xtask lab run -- target/isopod/isopod run BUNDLE/

The lab shows this machine's files. It may not see changes that are made while it runs, except in
cargo's target directory. Writes to that directory reach this machine; all other writes are lost
when the lab ends. /tmp, /run, /var/tmp and some directories below /var/lib are the lab's own. Those
of this machine are below /run/host.";

/// Runs the words after `lab`. Returns the exit status of this process.
pub(crate) fn main(mut args: lexopt::Parser) -> Result<i32> {
    let mut options = LabOptions::default();
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
                // The words after the command are its arguments, even if they look like options.
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
        "run" => ended(&background::run(&Run::here(argv)?, Input::for_lab())?),
        "once" => {
            let lab = Lab::private(&options)?;
            ended(&lab.run(&Run::here(argv)?, Input::for_lab(), &mut Show::Through)?)
        }
        _ => bail!("which command: up, run, once, status or down?\n{HELP}"),
    }
}

/// Exit status for the end of a command. A refusal is printed.
fn ended(ended: &super::Ended) -> Result<i32> {
    if let super::Ended::Refused(why) = ended {
        say(format!("the lab: {why}"));
    }
    Ok(ended.status())
}

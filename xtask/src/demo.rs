//! `cargo xtask demo`: builds everything and runs an OCI bundle in a microVM.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use lexopt::prelude::*;

use crate::apt::{self, Need};
use crate::bundle::Given;
use crate::lab::{self, Ended, Input, LabOptions, Run, Show};
use crate::process::shell_line;
use crate::progress::{say, step};
use crate::target::{self, Target};
use crate::{build, bundle};

const HELP: &str = "\
Usage: cargo xtask demo [-- BUNDLE [COMMAND...]]

Installs missing Debian packages, builds everything, and runs an OCI bundle in its own microVM. The
default bundle is made for the demo and contains busybox. COMMAND replaces the bundle's process.

Without hardware KVM the demo runs in the lab. There the bundle gets no terminal, and the files that
it writes are lost.";

const NEEDS: [Need; 1] =
    [Need { package: "busybox-static", purpose: "the demo's root file system" }];

/// Shell script of the default bundle.
const SCRIPT: &str = "\
echo \"Hello from process $$ on $(hostname), Linux $(uname -r).\"
echo 'Processes here:'
ps -o pid,comm
echo 'Mounted as /:'
grep ' / ' /proc/mounts
";

/// Runs the demo. Returns the exit status of the bundle.
pub(crate) fn main(mut args: lexopt::Parser) -> Result<i32> {
    let mut words: Vec<String> = Vec::new();
    while let Some(arg) = args.next()? {
        match arg {
            Long("help") | Short('h') => {
                println!("{HELP}");
                return Ok(0);
            }
            Value(word) => {
                words.push(word.string()?);
                if words.len() == 2 {
                    // The words from here on are arguments of COMMAND, even if they look like
                    // options.
                    for rest in args.raw_args()? {
                        words.push(rest.string()?);
                    }
                }
            }
            _ => return Err(arg.unexpected().into()),
        }
    }
    let lab = target::needs(false)?;
    apt::ensure(build::needs().chain(NEEDS).chain(lab))?;
    let (dir, command) = choose(&words)?;
    let product = build::build()?;
    let uname = bundle::make("uname", &["uname".to_owned(), "-r".to_owned()])?;

    let target = Target::open(&LabOptions::default())?;
    let isopod = target.bring(&product)?.join("isopod");
    if !words.is_empty() {
        prepare(&target, &dir)?;
    }
    let mut argv = vec!["--timeline".to_owned(), dir.display().to_string()];
    if !command.is_empty() {
        argv.push("--".to_owned());
        argv.extend_from_slice(command);
    }
    say(format!("isopod run {}", shell_line(&argv)));
    let status = run(&target, &isopod, &argv, target.input(), &mut Show::Through)?;

    let mut guest = Vec::new();
    let asked = step("ask a microVM for its kernel", || {
        let args = [uname.display().to_string()];
        run(&target, &isopod, &args, Input::Nothing, &mut Show::Only(&mut guest))
    })?;
    if asked != 0 {
        bail!("`uname -r` in a microVM ended with status {asked}");
    }
    let mut host = Vec::new();
    let uname = Run::here(vec!["uname".to_owned(), "-r".to_owned()])?;
    target.run(&uname, Input::Nothing, &mut Show::Only(&mut host))?;
    let guest = String::from_utf8_lossy(&guest);
    let host = String::from_utf8_lossy(&host);
    println!();
    println!("kernel in the microVM    {}", guest.trim());
    println!("kernel {:<17} {}", target.name(), host.trim());
    if let Target::Lab(_) = target {
        let own = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        println!("kernel on this machine   {}", own.trim());
    }
    println!("exit status              {status}");
    if guest.trim() == host.trim() {
        bail!("the microVM has the kernel of its host");
    }
    if words.is_empty() {
        println!("\n{}", next_steps());
    }
    Ok(status)
}

/// Advice for the reader of the demo's output.
fn next_steps() -> &'static str {
    if target::has_hardware_kvm() {
        "That ran in a microVM with its own kernel. `cargo xtask demo -- BUNDLE` runs your bundle,
and `cargo xtask install` installs the runtime on this machine."
    } else {
        "That ran in a microVM with its own kernel, in the lab. `cargo xtask demo -- BUNDLE` runs your
bundle. This machine has no hardware KVM, so an installed isopod cannot run sandboxes here. The lab
can: `cargo xtask lab --help` says how to run commands in it."
    }
}

/// The bundle to run, and the command that replaces its process (empty: none).
fn choose(words: &[String]) -> Result<(PathBuf, &[String])> {
    match words {
        [] => {
            let dir = bundle::make("demo", &["sh".to_owned(), "/root/demo.sh".to_owned()])?;
            let script = dir.join("rootfs/root/demo.sh");
            fs::write(&script, SCRIPT)
                .with_context(|| format!("cannot write {}", script.display()))?;
            Ok((dir, &[]))
        }
        [given, command @ ..] => {
            let given = fs::canonicalize(given)
                .with_context(|| format!("cannot find the bundle {given}"))?;
            if !given.is_dir() {
                bail!("{} is not a bundle: it is not a directory", given.display());
            }
            if !given.join("config.json").is_file() {
                bail!("{} is not a bundle: it has no config.json", given.display());
            }
            Ok((given, command))
        }
    }
}

/// Shows a bundle of the user to the lab, with `terminal` false: the lab has no terminal.
fn prepare(target: &Target, dir: &Path) -> Result<()> {
    let Target::Lab(_) = target else { return Ok(()) };
    let given = Given::read(dir.to_owned())?;
    target.expose(&given.paths())?;
    say("what the bundle writes to its files in the lab is lost when the lab ends");
    let Some(config) = given.without_terminal()? else { return Ok(()) };
    say("the bundle asks for a terminal and the lab has none: it runs there with `terminal` false");
    // Replaces the file in the lab's overlay. The user's file stays as it is.
    let to = dir.join("config.json");
    target.must(&["cp", "--remove-destination", "--", lab::text(&config)?, lab::text(&to)?])
}

/// Runs `isopod run` with `args`. Returns its exit status.
fn run(
    target: &Target,
    isopod: &Path,
    args: &[String],
    input: Input,
    show: &mut Show<'_>,
) -> Result<i32> {
    let mut argv = vec![isopod.display().to_string(), "run".to_owned()];
    argv.extend_from_slice(args);
    match target.run(&Run::here(argv)?, input, show)? {
        Ended::Status(status) => Ok(status),
        Ended::Refused(why) => bail!("{why}"),
    }
}

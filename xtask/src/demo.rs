//! `cargo xtask demo`: everything from a bare machine to an OCI bundle in its own microVM.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use lexopt::prelude::*;

use crate::apt::{self, Need};
use crate::bundle::Given;
use crate::lab::{self, Ended, Input, Options, Run, Show};
use crate::place::{self, Place};
use crate::progress::{say, step};
use crate::{build, bundle};

const HELP: &str = "\
Usage: cargo xtask demo [-- BUNDLE [COMMAND...]]

Installs what is missing, builds everything, and runs an OCI bundle in a microVM of its own: BUNDLE, or
a busybox made for it. COMMAND takes the place of the bundle's process.

Without hardware KVM it runs in the lab, where the bundle gets no terminal, and what it writes is lost.";

const NEEDS: [Need; 1] =
    [Need { package: "busybox-static", purpose: "the demo's root file system" }];

/// What the bundle made here runs.
const SCRIPT: &str = "\
echo \"Hello from process $$ on $(hostname), Linux $(uname -r).\"
echo 'Processes here:'
ps -o pid,args
echo 'Mounted as /:'
grep ' / ' /proc/mounts
";

/// Runs the demo and returns the bundle's exit status.
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
                    // The rest belongs to the command.
                    for rest in args.raw_args()? {
                        words.push(rest.string()?);
                    }
                }
            }
            _ => return Err(arg.unexpected().into()),
        }
    }
    let lab = place::needs(false)?;
    apt::ensure(build::needs().chain(NEEDS).chain(lab))?;
    let (dir, command) = choose(&words)?;
    let product = build::build()?;
    let uname = bundle::make("uname", &["uname".to_owned(), "-r".to_owned()])?;

    let place = Place::open(&Options::default())?;
    let isopod = place.bring(&product)?.join("isopod");
    if !words.is_empty() {
        prepare(&place, &dir)?;
    }
    let mut argv = vec!["--timeline".to_owned(), dir.display().to_string()];
    if !command.is_empty() {
        argv.push("--".to_owned());
        argv.extend_from_slice(command);
    }
    say(format!("isopod run {}", argv.join(" ")));
    let status = run(&place, &isopod, &argv, place.input(), &mut Show::Through)?;

    let mut guest = Vec::new();
    let asked = step("ask a microVM for its kernel", || {
        let args = [uname.display().to_string()];
        run(&place, &isopod, &args, Input::Nothing, &mut Show::Only(&mut guest))
    })?;
    if asked != 0 {
        bail!("`uname -r` in a microVM ended with status {asked}");
    }
    let mut host = Vec::new();
    let uname = Run::here(vec!["uname".to_owned(), "-r".to_owned()])?;
    place.run(&uname, Input::Nothing, &mut Show::Only(&mut host))?;
    let guest = String::from_utf8_lossy(&guest);
    let host = String::from_utf8_lossy(&host);
    println!();
    println!("kernel in the microVM    {}", guest.trim());
    println!("kernel {:<17} {}", place.name(), host.trim());
    if let Place::Lab(_) = place {
        let own = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        println!("kernel on this machine   {}", own.trim());
    }
    println!("exit status              {status}");
    if guest.trim() == host.trim() {
        bail!("the microVM has the kernel of its host");
    }
    if words.is_empty() {
        println!(
            "\nThat ran in a microVM with a kernel of its own. Next: `cargo xtask demo -- BUNDLE` runs"
        );
        println!("yours, `cargo xtask install` makes a runtime of it for this machine.");
    }
    Ok(status)
}

/// The bundle to run, and what it is to run in place of its process.
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
            if !given.join("config.json").is_file() {
                bail!("{} is no bundle: it has no config.json", given.display());
            }
            Ok((given, command))
        }
    }
}

/// Makes a given bundle fit for the lab, where it gets no terminal, and says so.
fn prepare(place: &Place, dir: &Path) -> Result<()> {
    let Place::Lab(_) = place else { return Ok(()) };
    let given = Given::read(dir.to_owned())?;
    place.expose(&given.paths())?;
    say("what the bundle writes to its files in the lab is lost when the lab ends");
    let Some(config) = given.without_terminal()? else { return Ok(()) };
    say("the bundle asks for a terminal and the lab has none: it runs there with `terminal` false");
    // The lab's view of the bundle, not the user's file.
    let to = dir.join("config.json");
    place.must(&["cp", "--remove-destination", "--", lab::text(&config)?, lab::text(&to)?])
}

/// Runs `isopod run` with `args`.
fn run(
    place: &Place,
    isopod: &Path,
    args: &[String],
    input: Input,
    show: &mut Show<'_>,
) -> Result<i32> {
    let mut argv = vec![isopod.display().to_string(), "run".to_owned()];
    argv.extend_from_slice(args);
    match place.run(&Run::here(argv)?, input, show)? {
        Ended::Status(status) => Ok(status),
        Ended::Refused(why) => bail!("{why}"),
    }
}

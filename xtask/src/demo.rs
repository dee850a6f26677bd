//! `cargo xtask demo`: everything from a bare machine to an OCI bundle in its own microVM.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use lexopt::prelude::*;

use crate::apt::{self, Need};
use crate::lab::{self, Ended, Options, Run, Show};
use crate::place::{Place, hardware_kvm, own_input};
use crate::progress::{say, step};
use crate::{build, bundle};

const HELP: &str = "\
Usage: cargo xtask demo [-- BUNDLE [COMMAND...]]

Installs what is missing, builds everything, and runs an OCI bundle in a microVM of its own: BUNDLE, or
a busybox made for it. COMMAND takes the place of the bundle's process.";

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
    let in_lab = if hardware_kvm() { &[][..] } else { &lab::NEEDS[..] };
    apt::ensure(build::needs().chain(NEEDS).chain(in_lab.iter().copied()))?;
    let product = build::build()?;
    let uname = bundle::make("uname", &["uname".to_owned(), "-r".to_owned()])?;
    let (dir, what) = choose(&words)?;

    let place = Place::open(&Options::default())?;
    let isopod = place.bring(&product)?.join("isopod");
    say(format!("isopod run --bundle {} ({what})", dir.display()));
    let name = format!("demo-{}", std::process::id());
    let status = run(&place, &isopod, &dir, &name, &["--timeline"], &mut Show::Through)?;

    let mut guest = Vec::new();
    let asked = step("ask a microVM for its kernel", || {
        run(&place, &isopod, &uname, &format!("{name}-uname"), &[], &mut Show::Only(&mut guest))
    })?;
    if asked != 0 {
        bail!("`uname -r` in a microVM ended with status {asked}");
    }
    let mut host = Vec::new();
    let uname = Run::here(vec!["uname".to_owned(), "-r".to_owned()])?;
    place.run(&uname, lab::Input::Nothing, &mut Show::Only(&mut host))?;
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
    Ok(status)
}

/// The bundle to run, and what to call it.
fn choose(words: &[String]) -> Result<(PathBuf, &'static str)> {
    match words {
        [] => {
            let dir = bundle::make("demo", &["sh".to_owned(), "/root/demo.sh".to_owned()])?;
            let script = dir.join("rootfs/root/demo.sh");
            fs::write(&script, SCRIPT)
                .with_context(|| format!("cannot write {}", script.display()))?;
            Ok((dir, "a busybox, made for this"))
        }
        [given, command @ ..] => {
            let given = fs::canonicalize(given)
                .with_context(|| format!("cannot find the bundle {given}"))?;
            if !given.join("config.json").is_file() {
                bail!("{} is no bundle: it has no config.json", given.display());
            }
            match command {
                [] => Ok((given, "as given")),
                args => {
                    Ok((bundle::with_args("given", &given, args)?, "as given, another command"))
                }
            }
        }
    }
}

fn run(
    place: &Place,
    isopod: &Path,
    bundle: &Path,
    name: &str,
    options: &[&str],
    show: &mut Show<'_>,
) -> Result<i32> {
    let mut argv = vec![isopod.display().to_string(), "run".to_owned()];
    argv.extend(options.iter().map(|&option| option.to_owned()));
    argv.extend(["--bundle".to_owned(), bundle.display().to_string(), name.to_owned()]);
    match place.run(&Run::here(argv)?, own_input(), show)? {
        Ended::Status(status) => Ok(status),
        Ended::Refused(why) => bail!("{why}"),
    }
}

//! `isopod-bench`: measures the built programs, beside a peer in the same run where there is one.
//!
//! The clock of the machine should count instructions, as in the lab of `cargo xtask bench`. Then a
//! millisecond is a million instructions, called a unit. On other machines a unit is a millisecond
//! of wall time, and only ratios mean something.

mod boot;
mod child_guard;
mod clock;
mod cycle;
mod figure;
mod files;
mod guest;
mod net;
mod qemu;
mod runtime;
mod sizes;
mod vmm;
mod workload;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};

use crate::figure::Figure;

const HELP: &str = "\
Usage: isopod-bench boot|cycle|files|net --programs DIR --bundle DIR [--runs N] [--json FILE]

  boot             a microVM until its agent is ready, and `run`, beside QEMU
  cycle            create, start, wait, delete, and exec, beside runc and crun
  files            what a guest does with the host's files, beside QEMU with virtiofsd
  net              traffic between a container and the host, beside runc and QEMU

  --programs DIR   folder of isopod, isopod-vmm, vmlinux and isopod.initramfs
  --bundle DIR     an OCI bundle whose process is /bin/true
  --tree DIR       for `files`: a Debian tree with gcc and tar
  --virtiofsd FILE for `files`: Debian's virtiofsd
  --runs N         runs of each measurement; the smallest value counts [5]
  --json FILE      also write the figures to FILE";

/// Options of the command line.
struct Arguments {
    programs: PathBuf,
    bundle: PathBuf,
    tree: Option<PathBuf>,
    virtiofsd: Option<PathBuf>,
    runs: usize,
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("isopod-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut words = std::env::args().skip(1);
    let measure: fn(&Arguments) -> Result<Vec<Figure>> = match words.next().as_deref() {
        Some("boot") => |a| boot::measure(&a.programs, &a.bundle, a.runs),
        Some("cycle") => |a| cycle::measure(&a.programs, &a.bundle, a.runs),
        Some("files") => |a| {
            let tree = a.tree.as_deref().context("`files` needs --tree")?;
            let server = a.virtiofsd.as_deref().context("`files` needs --virtiofsd")?;
            let files = files::Files { programs: &a.programs, bundle: &a.bundle, tree, server };
            files.measure(a.runs)
        },
        Some("net") => |a| net::measure(&a.programs, &a.bundle, a.runs),
        // The program of `files` in guests.
        Some("work") => return files::work(words.next().context("`work` needs a path")?.as_ref()),
        // The program of `net` in containers.
        Some("peer") => return net::peer(&words.next().context("`peer` needs an address")?),
        Some("--help" | "-h") => {
            println!("{HELP}");
            return Ok(());
        }
        _ => bail!("which benchmark?\n{HELP}"),
    };
    let arguments = parse(words)?;
    let figures = measure(&arguments)?;
    print!("{}", figure::table(&figures));
    if let Some(file) = &arguments.json {
        let json = serde_json::to_vec_pretty(&figures)?;
        std::fs::write(file, json).with_context(|| format!("writing {}", file.display()))?;
    }
    Ok(())
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Arguments> {
    let (mut programs, mut bundle, mut runs, mut json) = (None, None, 5, None);
    let (mut tree, mut virtiofsd) = (None, None);
    while let Some(word) = words.next() {
        let value = words.next().with_context(|| format!("{word} needs a value\n{HELP}"))?;
        match word.as_str() {
            "--programs" => programs = Some(PathBuf::from(value)),
            "--bundle" => bundle = Some(PathBuf::from(value)),
            "--tree" => tree = Some(PathBuf::from(value)),
            "--virtiofsd" => virtiofsd = Some(PathBuf::from(value)),
            "--runs" => runs = value.parse().context("--runs")?,
            "--json" => json = Some(PathBuf::from(value)),
            _ => bail!("there is no option {word}\n{HELP}"),
        }
    }
    if runs == 0 {
        bail!("--runs has to be 1 or more");
    }
    let programs = programs.with_context(|| format!("--programs is missing\n{HELP}"))?;
    let bundle = bundle.with_context(|| format!("--bundle is missing\n{HELP}"))?;
    Ok(Arguments { programs, bundle, tree, virtiofsd, runs, json })
}

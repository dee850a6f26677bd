//! `isopod-bench`: measures the built programs, beside a peer of the same run where there is one.
//!
//! Meant for a machine whose clock counts instructions (`cargo xtask bench` boots one): there a
//! millisecond is a million instructions, called a unit. Elsewhere the same numbers are wall times,
//! good only for their ratios.

mod boot;
mod clock;
mod cycle;
mod figure;
mod net;
mod qemu;
mod runtime;
mod sizes;
mod vmm;
mod workload;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};

const HELP: &str = "\
Usage: isopod-bench boot|cycle|net --programs DIR --bundle DIR [--runs N] [--json FILE]

  boot             a microVM until its agent is ready, and `run`, beside QEMU
  cycle            create, start, wait, delete, and exec, beside runc and crun
  net              traffic between a container and the host, beside runc and QEMU

  --programs DIR   where isopod, isopod-vmm, vmlinux and isopod.initramfs are
  --bundle DIR     an OCI bundle whose process is /bin/true
  --runs N         runs of each, the least counts [5]
  --json FILE      also write the figures there";

/// What the command line asks for.
struct Arguments {
    programs: PathBuf,
    bundle: PathBuf,
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
    let measure = match words.next().as_deref() {
        Some("boot") => boot::measure,
        Some("cycle") => cycle::measure,
        Some("net") => net::measure,
        // What `net` runs in containers.
        Some("peer") => return net::peer(&words.next().context("peer of whom?")?),
        Some("--help" | "-h") => {
            println!("{HELP}");
            return Ok(());
        }
        _ => bail!("which benchmark?\n{HELP}"),
    };
    let arguments = parse(words)?;
    let figures = measure(&arguments.programs, &arguments.bundle, arguments.runs)?;
    print!("{}", figure::table(&figures));
    if let Some(file) = &arguments.json {
        let json = serde_json::to_vec_pretty(&figures)?;
        std::fs::write(file, json).with_context(|| format!("writing {}", file.display()))?;
    }
    Ok(())
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Arguments> {
    let (mut programs, mut bundle, mut runs, mut json) = (None, None, 5, None);
    while let Some(word) = words.next() {
        let value = words.next().with_context(|| format!("{word} needs a value\n{HELP}"))?;
        match word.as_str() {
            "--programs" => programs = Some(PathBuf::from(value)),
            "--bundle" => bundle = Some(PathBuf::from(value)),
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
    Ok(Arguments { programs, bundle, runs, json })
}

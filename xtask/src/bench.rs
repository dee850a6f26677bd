//! `cargo xtask bench`: runs the benchmarks in a lab that counts instructions.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use lexopt::prelude::*;

use crate::apt::Need;
use crate::lab::{Ended, Input, LabOptions, Run, Show, qemu_install};
use crate::progress::step;
use crate::target::{self, Target};
use crate::{apt, build, bundle, repository, test};

const HELP: &str = "\
Usage: cargo xtask bench boot|cycle|files|net [--runs N] [--json FILE]

  boot          a microVM until its agent is ready, and `run`, beside QEMU
  cycle         create, start, wait, delete, and exec, beside runc and crun
  files         what a guest does with the host's files, beside QEMU with virtiofsd
  net           traffic between a container and the host, beside runc and QEMU

  --runs N      runs of each measurement; the smallest value counts [3]
  --json FILE   also write the figures to FILE";

const BENCHMARKS: [&str; 4] = ["boot", "cycle", FILES, "net"];

/// The file benchmark. Its guests work in the Debian tree of the workload tests.
const FILES: &str = "files";

/// The runtimes that the cycle benchmark measures beside Isopod.
const PEERS: [Need; 2] = [
    Need { package: "crun", purpose: "peer of a benchmark" },
    Need { package: "runc", purpose: "peer of a benchmark" },
];

/// Runs a benchmark. Returns its exit status.
pub(crate) fn main(mut args: lexopt::Parser) -> Result<i32> {
    let mut benchmark: Option<String> = None;
    let mut json: Option<PathBuf> = None;
    let mut runs: u32 = 3;
    while let Some(arg) = args.next()? {
        match arg {
            Long("help") | Short('h') => {
                println!("{HELP}");
                return Ok(0);
            }
            Long("json") => json = Some(args.value()?.into()),
            Long("runs") => runs = args.value()?.parse()?,
            Value(word) if benchmark.is_none() => benchmark = Some(word.string()?),
            _ => return Err(arg.unexpected().into()),
        }
    }
    let Some(benchmark) = benchmark else {
        bail!("which benchmark?\n{HELP}");
    };
    if !BENCHMARKS.contains(&benchmark.as_str()) {
        bail!("there is no benchmark `{benchmark}`\n{HELP}");
    }
    apt::ensure(build::needs().chain(target::needs(true)?).chain(PEERS))?;
    // Before the lab boots: changes on this machine may not be seen in a running lab.
    let tree = if benchmark == FILES { Some(test::workload_tree()?) } else { None };
    let product = build::build()?;
    let compiled = step("compile the benchmarks", || build::compile(&["isopod-bench"]))?;
    build::place(&compiled.join("isopod-bench"), &product.join("isopod-bench"))?;
    let target = Target::open(&LabOptions { count: true, ..LabOptions::default() })?;
    let programs = target.bring(&product)?;
    let bundle = target.bring(&bundle::make("true", &["/bin/true".to_owned()])?)?;
    let figures = repository::target().join("figures.json");
    let mut argv = vec![
        programs.join("isopod-bench").display().to_string(),
        benchmark.clone(),
        "--programs".to_owned(),
        programs.display().to_string(),
        "--bundle".to_owned(),
        bundle.display().to_string(),
        "--runs".to_owned(),
        runs.to_string(),
        "--json".to_owned(),
        figures.display().to_string(),
    ];
    if let Some(tree) = tree {
        target.expose(std::slice::from_ref(&tree))?;
        argv.extend(["--tree".to_owned(), tree.display().to_string()]);
        argv.extend(["--virtiofsd".to_owned(), qemu_install::virtiofsd()?.display().to_string()]);
    }
    let mut run = Run::here(argv)?;
    for (name, value) in qemu_install::environment() {
        run.env.retain(|(other, _)| *other != name);
        run.env.push((name, value));
    }
    let ended = step(&format!("measure: {benchmark}"), || {
        target.run(&run, Input::Nothing, &mut Show::Through)
    })?;
    if let Ended::Refused(why) = &ended {
        bail!("{why}");
    }
    if let Some(file) = json
        && ended.status() == 0
    {
        fs::copy(&figures, &file).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(ended.status())
}

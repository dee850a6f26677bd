//! `isopod run` of a bundle, measured from its exec to its exit.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::clock;

/// Exit status of `isopod run` if it fails itself.
const FAILED: i32 = 1;

/// Runs the bundle once. Returns the units.
pub(crate) fn run(programs: &Path, bundle: &Path) -> Result<f64> {
    run_command(programs, bundle, &[], 0)
}

/// Runs the bundle once with a program that it lacks. Returns the units until `run` has failed.
pub(crate) fn run_missing(programs: &Path, bundle: &Path) -> Result<f64> {
    run_command(programs, bundle, &["--", "no-such-program"], FAILED)
}

fn run_command(programs: &Path, bundle: &Path, command: &[&str], status: i32) -> Result<f64> {
    let isopod = programs.join("isopod");
    let bundle = std::path::absolute(bundle)?;
    let start = clock::now()?;
    let output = Command::new(&isopod)
        .arg("run")
        .arg(bundle)
        .args(command)
        // A limit of an hour, because the clock may jump during file reads (see `clock`).
        .env("ISOPOD_BOOT_TIMEOUT", "3600")
        .stdin(Stdio::null())
        .output()
        .with_context(|| isopod.display().to_string())?;
    let took = clock::now()? - start;
    if output.status.code() != Some(status) {
        bail!("isopod run: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(took)
}

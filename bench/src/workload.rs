//! `isopod run` of a bundle, from its exec to its exit.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::clock;

/// Runs the bundle once. Returns the units it took.
pub(crate) fn run(programs: &Path, bundle: &Path, id: &str) -> Result<f64> {
    let isopod = programs.join("isopod");
    let start = clock::now()?;
    let output = Command::new(&isopod)
        .arg("run")
        .arg("--bundle")
        .arg(bundle)
        .arg(id)
        .stdin(Stdio::null())
        .output()
        .with_context(|| isopod.display().to_string())?;
    let took = clock::now()? - start;
    if !output.status.success() {
        bail!("isopod run: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(took)
}

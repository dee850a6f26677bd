//! The clock of all figures.
//!
//! Waits of a benchmark have no time limit. The clock of a machine that counts instructions jumps
//! to the next timer whenever all processors are idle, so a limit would expire during a file read.
//! Waits end with the process that they wait for.

use std::time::Duration;

use anyhow::Result;
use nix::time::ClockId;

/// `CLOCK_MONOTONIC` in units: milliseconds, which are millions of instructions in a counting lab.
pub(crate) fn now() -> Result<f64> {
    Ok(Duration::from(ClockId::CLOCK_MONOTONIC.now()?).as_secs_f64() * 1000.0)
}

/// The smallest of `values`.
///
/// The work is the same in every run on a machine that counts instructions. Larger values contain
/// waits for the host's disk, or timer ticks.
pub(crate) fn least(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().fold(f64::INFINITY, f64::min)
}

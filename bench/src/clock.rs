//! The clock of all figures.
//!
//! No wait of a benchmark has a limit in time: the clock of a machine that counts jumps to the next
//! timer whenever all are idle, so a limit would be over while a file is being read. Waits watch the
//! process that they wait for.

use std::time::Duration;

use anyhow::Result;
use nix::time::ClockId;

/// `CLOCK_MONOTONIC` in units: milliseconds, or million instructions on a machine that counts.
pub(crate) fn now() -> Result<f64> {
    Ok(Duration::from(ClockId::CLOCK_MONOTONIC.now()?).as_secs_f64() * 1000.0)
}

/// The least of `values`. A machine that counts does the same work each time; what a run takes
/// more is waiting for the host's disk or its timer ticks.
pub(crate) fn least(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().fold(f64::INFINITY, f64::min)
}

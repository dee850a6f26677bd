//! The clock of all figures.

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

//! The clock of all figures.

use std::time::Duration;

use anyhow::Result;
use nix::time::ClockId;

/// `CLOCK_MONOTONIC` in units: milliseconds, or million instructions on a machine that counts.
pub(crate) fn now() -> Result<f64> {
    Ok(Duration::from(ClockId::CLOCK_MONOTONIC.now()?).as_secs_f64() * 1000.0)
}

/// The middle one of `values`, which must not be empty.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

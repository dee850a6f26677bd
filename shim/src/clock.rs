//! Clocks, in the units that the rest of this crate uses.

use std::time::{SystemTime, UNIX_EPOCH};

/// `CLOCK_MONOTONIC` in microseconds, comparable between processes of one boot of the host.
pub fn monotonic_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds * 1_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1000
}

/// The wall clock in nanoseconds since the epoch, or 0 if it is set to before the epoch.
pub fn realtime_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(0)
}

/// The wall clock as runc writes it: RFC 3339 with nanoseconds.
pub fn timestamp() -> String {
    humantime::format_rfc3339_nanos(SystemTime::now()).to_string()
}

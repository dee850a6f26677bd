//! The guest's wall clock, which follows the host's.

use std::io;

use rustix::time::{ClockId, clock_gettime};

use crate::error::{Context as _, Error, Result};

const NS_PER_S: i64 = 1_000_000_000;

/// Moves the clock by `difference_ns` and returns the new time, in nanoseconds since the epoch.
///
/// A gradual change runs at half a millisecond per second, so no program sees the clock jump. A
/// clock before the epoch is an error.
pub(crate) fn adjust(difference_ns: i64, gradually: bool) -> Result<u64> {
    if difference_ns != 0 {
        // SAFETY: `timex` is plain numbers, and all zeros are a valid value.
        let mut change: libc::timex = unsafe { std::mem::zeroed() };
        if gradually {
            change.modes = libc::ADJ_OFFSET_SINGLESHOT;
            change.offset = difference_ns / 1000;
        } else {
            change.modes = libc::ADJ_SETOFFSET;
            // The kernel wants a positive fraction of a second, whatever the sign of the whole.
            change.time.tv_sec = difference_ns.div_euclid(NS_PER_S);
            change.time.tv_usec = difference_ns.rem_euclid(NS_PER_S) / 1000;
        }
        // SAFETY: the call reads and writes only the structure behind the reference.
        if unsafe { libc::adjtimex(&raw mut change) } < 0 {
            return Err(io::Error::last_os_error()).context(|| "adjust the guest's clock");
        }
    }
    let now = clock_gettime(ClockId::Realtime);
    let now = now.tv_sec.checked_mul(NS_PER_S).and_then(|ns| ns.checked_add(now.tv_nsec));
    now.and_then(|ns| u64::try_from(ns).ok())
        .ok_or_else(|| Error::internal("the guest's clock is before 1970 or after 2262"))
}

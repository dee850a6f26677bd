//! The guest's wall clock, kept with the host's for as long as the microVM lives.
//!
//! The guest counts time by the host's processors, at a rate that nobody corrects, from the moment that
//! its clock was set. Two things take it away from the host's: a step of that (by a person, or after a
//! suspend), which the kernel tells at once, and the small corrections of its rate that an NTP daemon
//! makes, at most half a millisecond a second. What those come to is seen here, without asking the guest.

use std::{os::fd::OwnedFd, time::Duration};

use rustix::{
    io::Errno,
    time::{
        ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec,
        clock_gettime, timerfd_create, timerfd_settime,
    },
};
use tokio::{
    io::unix::AsyncFd,
    time::{Instant, sleep, timeout},
};

use super::{agent::Agent, wait_for};
use crate::{
    clock,
    error::{Error, ErrorKind, Explain, Result},
};

/// How often the rates of the clocks are compared on the host. It costs the guest nothing.
const COMPARE_INTERVAL: Duration = Duration::from_secs(30);

/// How often the guest is asked at least: its own idea of the processor's rate may be a little wrong.
const ASK_INTERVAL: Duration = Duration::from_secs(600);

/// How long setting the guest's clock may take for it to be known to be right.
pub(super) const WELL_SET: Duration = Duration::from_millis(20);

/// Pause after a failure.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// How long the guest may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// A difference that is left alone, in nanoseconds.
const TOLERANCE_NS: i64 = 5_000_000;

/// A difference up to which the guest's clock is made faster or slower for a while, and does not jump.
const GRADUAL_NS: i64 = 20_000_000;

/// Most questions for one correction: a guest need not do as it is told.
const MAX_QUESTIONS: u32 = 6;

/// Steps of the host's wall clock.
pub(super) struct Steps(AsyncFd<OwnedFd>);

impl Steps {
    /// Counts from here on.
    ///
    /// # Errors
    ///
    /// If the kernel gives no timer.
    pub(super) fn watch() -> Result<Self> {
        let what = || "cannot watch the clock".to_owned();
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Realtime, flags).explain(what)?;
        // It never expires, only is cancelled.
        let never = Timespec { tv_sec: i64::MAX, tv_nsec: 0 };
        let times = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: never };
        let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
        timerfd_settime(&timer, flags, &times).explain(what)?;
        Ok(Self(wait_for(timer).explain(what)?))
    }

    /// Waits for the next step.
    async fn next(&self) {
        loop {
            // The runtime ends, and with it all that is done here.
            let Ok(mut guard) = self.0.readable().await else {
                return std::future::pending().await;
            };
            let read = guard
                .try_io(|timer| rustix::io::read(timer, &mut [0; 8]).map_err(std::io::Error::from));
            match read {
                Ok(Err(e)) if Errno::from_io_error(&e) == Some(Errno::CANCELED) => return,
                _ => {}
            }
        }
    }
}

/// Keeps the guest's clock with the host's until the microVM is gone. It was set when `steps` were
/// watched already; `ask` if it may not have been set well.
pub(super) async fn keep(agent: Agent, steps: Steps, mut ask: bool) {
    let (mut rate, mut asked) = (Rate::now(), Instant::now());
    loop {
        if ask {
            let now = Rate::now();
            match correct(&agent).await {
                Ok(()) => (rate, asked, ask) = (now, Instant::now(), false),
                Err(error) if error.kind == ErrorKind::VmLost => return,
                Err(error) => {
                    log::debug!("the guest's clock cannot be kept with the host's: {error}");
                    sleep(RETRY_INTERVAL).await;
                }
            }
            continue;
        }
        tokio::select! {
            () = steps.next() => ask = true,
            () = sleep(COMPARE_INTERVAL) => {
                ask = rate.has_moved() || asked.elapsed() >= ASK_INTERVAL;
            }
        }
    }
}

/// Where the host's wall clock is beside the clock that nobody corrects.
struct Rate(i128);

impl Rate {
    fn now() -> Self {
        let ns = |id| {
            let now: Timespec = clock_gettime(id);
            i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)
        };
        Self(ns(ClockId::Realtime) - ns(ClockId::MonotonicRaw))
    }

    fn has_moved(&self) -> bool {
        (Self::now().0 - self.0).abs() > i128::from(TOLERANCE_NS)
    }
}

/// Compares the clocks and sets the guest's right.
async fn correct(agent: &Agent) -> Result<()> {
    let mut is_off = true;
    for _ in 0..MAX_QUESTIONS {
        let Reading { ahead_ns, error_ns } = ask(agent, 0, false).await?;
        is_off = ahead_ns.saturating_abs() > TOLERANCE_NS.saturating_add(error_ns);
        if is_off {
            let gradually = ahead_ns.saturating_abs() <= GRADUAL_NS;
            ask(agent, ahead_ns.saturating_neg(), gradually).await?;
            if gradually {
                return Ok(());
            }
        } else if error_ns <= GRADUAL_NS {
            return Ok(());
        }
        // Else the answer took so long that it tells too little.
    }
    if is_off { Err(Error::new("it does not go where it is set")) } else { Ok(()) }
}

/// What a question tells of the guest's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Reading {
    /// How far it is ahead of the host's, or behind if negative.
    ahead_ns: i64,
    /// By how much that may be wrong either way.
    error_ns: i64,
}

impl Reading {
    /// The guest read its clock between the two moments.
    fn new(before_ns: u64, guest_ns: u64, after_ns: u64) -> Self {
        let error = after_ns.saturating_sub(before_ns) / 2;
        let ahead = i128::from(guest_ns) - i128::from(before_ns) - i128::from(error);
        let limited =
            |ns: i128| i64::try_from(ns).unwrap_or(if ns < 0 { i64::MIN } else { i64::MAX });
        Self { ahead_ns: limited(ahead), error_ns: limited(error.into()) }
    }
}

/// Has the guest move its clock and reads it.
async fn ask(agent: &Agent, difference_ns: i64, gradually: bool) -> Result<Reading> {
    let before_ns = clock::realtime_ns();
    let answer = timeout(ANSWER_LIMIT, agent.adjust_clock(difference_ns, gradually)).await;
    let guest_ns = answer.map_err(|_| Error::new("the guest does not answer"))??;
    Ok(Reading::new(before_ns, guest_ns, clock::realtime_ns()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reading_lies_between_two_moments() {
        let reading = |before, guest, after| {
            let Reading { ahead_ns, error_ns } = Reading::new(before, guest, after);
            (ahead_ns, error_ns)
        };
        assert_eq!(reading(1000, 1010, 1020), (0, 10));
        assert_eq!(reading(1000, 5010, 1020), (4000, 10));
        assert_eq!(reading(1000, 10, 1020), (-1000, 10));
        // A guest that lies, and a clock that was set back meanwhile.
        assert_eq!(reading(0, u64::MAX, 0), (i64::MAX, 0));
        assert_eq!(reading(u64::MAX, 0, u64::MAX), (i64::MIN, 0));
        assert_eq!(reading(1000, 1000, 10), (0, 0));
    }

    #[test]
    fn the_rates_of_the_clocks_are_compared_without_the_guest() {
        let mut rate = Rate::now();
        assert!(!rate.has_moved());
        rate.0 += 2 * i128::from(TOLERANCE_NS);
        assert!(rate.has_moved());
    }
}

//! The guest's wall clock, kept with the host's for as long as the microVM lives.
//!
//! The guest counts time by the host's processors, at a rate that nobody corrects, from the moment
//! when its clock was set. Two things make the host's clock differ from that:
//!
//! - A step of the host's clock, by a person or after a suspend. The kernel reports it at once.
//! - Small corrections of its rate by an NTP daemon, at most half a millisecond a second. Their sum
//!   is seen on the host, without a question to the guest.

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

use crate::{
    clock,
    descriptor::wait_for,
    error::{Error, ErrorKind, Explain, Result},
    microvm::agent::Agent,
};

/// Interval at which the rates of the clocks are compared on the host. This costs the guest
/// nothing.
const COMPARE_INTERVAL: Duration = Duration::from_secs(30);

/// Longest interval between questions to the guest: its own idea of the processor's rate may be a
/// little wrong.
const ASK_INTERVAL: Duration = Duration::from_secs(600);

/// Longest time that setting the guest's clock may take for the clock to count as right.
pub(crate) const WELL_SET: Duration = Duration::from_millis(20);

/// Pause after a failure.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Longest time for an answer of the guest.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Largest difference that is left alone, in nanoseconds.
const TOLERANCE_NS: i64 = 5_000_000;

/// Largest difference that is corrected gradually, in nanoseconds. For a larger difference the
/// guest's clock jumps.
const GRADUAL_NS: i64 = 20_000_000;

/// Most questions for one correction: a guest need not do as it is told.
const MAX_QUESTIONS: u32 = 6;

/// Steps of the host's wall clock.
pub(crate) struct Steps(AsyncFd<OwnedFd>);

impl Steps {
    /// Starts to watch for steps.
    pub(crate) fn watch() -> Result<Self> {
        let what = || "cannot watch the clock".to_owned();
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Realtime, flags).explain(what)?;
        // The timer never expires. A step of the clock cancels it.
        let never = Timespec { tv_sec: i64::MAX, tv_nsec: 0 };
        let times = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: never };
        let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
        timerfd_settime(&timer, flags, &times).explain(what)?;
        Ok(Self(wait_for(timer).explain(what)?))
    }

    /// Waits for the next step.
    async fn next(&self) {
        loop {
            // An error means that the runtime ends, and this task with it.
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

/// Keeps the guest's clock with the host's until the microVM is gone. `steps` have to be watched
/// since before the clock was set. `ask` is true if the clock may not have been set well.
pub(crate) async fn keep(agent: Agent, steps: Steps, mut ask: bool) {
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

/// Difference of the host's wall clock from the clock that nobody corrects, in nanoseconds.
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
        // Otherwise the answer took too long to tell enough.
    }
    if is_off { Err(Error::new("the guest does not keep the time that is set")) } else { Ok(()) }
}

/// The reading of the guest's clock against the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Reading {
    /// Lead of the guest's clock over the host's; negative if it is behind.
    ahead_ns: i64,
    /// Largest error of the lead in either direction.
    error_ns: i64,
}

impl Reading {
    /// Computes the reading of a guest that read its clock between two moments of the host.
    fn new(before_ns: u64, guest_ns: u64, after_ns: u64) -> Self {
        let error = after_ns.saturating_sub(before_ns) / 2;
        let ahead = i128::from(guest_ns) - i128::from(before_ns) - i128::from(error);
        let limited =
            |ns: i128| i64::try_from(ns).unwrap_or(if ns < 0 { i64::MIN } else { i64::MAX });
        Self { ahead_ns: limited(ahead), error_ns: limited(error.into()) }
    }
}

/// Has the guest move its clock, and reads the clock.
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
        // A guest that lies, and a host's clock that was set back meanwhile.
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

//! The wall clock inside is that of the host.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panics")]

use std::fs::{self, File};
use std::io::Write as _;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use isopod_tests::{DEADLINE, RunningCommand, Scope, skip};
use nix::sys::time::TimeSpec;
use nix::time::ClockId;

/// The greatest difference allowed between the clocks.
const APART: Duration = Duration::from_millis(50);

/// The host's clock, put right when the test ends.
struct HostClock {
    wall: Duration,
    since: Instant,
}

impl HostClock {
    fn new() -> Self {
        Self { wall: now(), since: Instant::now() }
    }

    fn set(time: Duration) {
        let (seconds, nanoseconds) = (time.as_secs(), time.subsec_nanos());
        let time = TimeSpec::new(seconds.try_into().unwrap(), nanoseconds.into());
        ClockId::CLOCK_REALTIME.set_time(time).unwrap();
    }
}

impl Drop for HostClock {
    fn drop(&mut self) {
        Self::set(self.wall + self.since.elapsed());
    }
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap()
}

/// Returns whether the clock inside is the host's, as far as the host can tell.
fn is_right(run: &mut RunningCommand<'_>, stdin: &mut File) -> bool {
    let before = now();
    writeln!(stdin).unwrap();
    let line = run.stdout.line().unwrap();
    let after = now();
    let inside = Duration::from_nanos(line.parse().unwrap());
    (before - APART..=after + APART).contains(&inside)
}

#[test]
fn the_clock_follows_that_of_the_host() {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    if name.trim() != "isopod-lab" {
        skip!("it sets the clock, which is for labs only");
    }
    let scope = Scope::new();
    let container = scope.container().probe(&["clock"]);
    let mut run = container.command_with_bundle("run", &[]).stdin_piped().spawn();
    let mut stdin = run.take_stdin();
    assert!(is_right(&mut run, &mut stdin), "at the start");
    let _clock = HostClock::new();
    for step in [|| now() + Duration::from_secs(3600), || now() - Duration::from_secs(7200)] {
        HostClock::set(step());
        let stepped = Instant::now();
        while !is_right(&mut run, &mut stdin) {
            assert!(stepped.elapsed() < DEADLINE, "the step is not followed");
        }
        println!("followed within {:?}", stepped.elapsed());
        assert!(is_right(&mut run, &mut stdin), "it has to stay so");
    }
    drop(stdin);
    run.output().ok();
}

//! Progress messages on standard error.
//!
//! A long step prints a line at its start, one every ten seconds, and one with its time at its end.

use std::io::{IsTerminal as _, Write as _, stderr};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

/// Time between two messages of a running step.
const REMINDER: Duration = Duration::from_secs(10);

/// Prints one line of progress.
pub(crate) fn say(text: impl AsRef<str>) {
    let (on, off) = if stderr().is_terminal() { ("\x1b[1;36m", "\x1b[0m") } else { ("", "") };
    // A closed standard error must not stop the work.
    let _ = writeln!(stderr(), "{on}isopod:{off} {}", text.as_ref());
}

/// Runs a step and prints its start, its progress every ten seconds, and its time.
pub(crate) fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    say(format!("{what} ..."));
    let began = Instant::now();
    let result = short_step(what, work);
    match &result {
        Ok(_) => say(format!("{what}: done in {}", seconds(began))),
        Err(_) => say(format!("{what}: failed after {}", seconds(began))),
    }
    result
}

/// Runs a step that is usually short. Prints its progress every ten seconds, and else nothing.
pub(crate) fn short_step<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let began = Instant::now();
    let (finished, waiting) = channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            while waiting.recv_timeout(REMINDER) == Err(RecvTimeoutError::Timeout) {
                say(format!("{what} ... {} so far", seconds(began)));
            }
        });
        // Dropped at the end of the work, also by a panic: the thread above then ends.
        let _finished = finished;
        work()
    })
}

/// Time since `began` as text.
pub(crate) fn seconds(began: Instant) -> String {
    human(began.elapsed())
}

/// A time as text: `2.3 s`, or `4 min 10 s`.
pub(crate) fn human(elapsed: Duration) -> String {
    match elapsed.as_secs() {
        0..60 => format!("{:.1} s", elapsed.as_secs_f64()),
        whole => format!("{} min {} s", whole / 60, whole % 60),
    }
}

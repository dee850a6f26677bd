//! The bound of every wait.

use std::time::{Duration, Instant};

/// The longest time of a single wait. A healthy run needs far less, even on an emulated machine. A
/// test that reaches the deadline fails with the name of its wait.
pub const DEADLINE: Duration = Duration::from_secs(240);

/// Polls `holds` until it returns true, at most for [`DEADLINE`]; returns false after that. For
/// states that nothing reports, such as a file that a guest has closed.
pub fn bounded(mut holds: impl FnMut() -> bool) -> bool {
    let until = Instant::now() + DEADLINE;
    while Instant::now() < until {
        if holds() {
            return true;
        }
    }
    false
}

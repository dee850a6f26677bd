//! The wall clock.

use std::io::{BufRead as _, Write as _};
use std::time::{SystemTime, UNIX_EPOCH};

/// Prints, for each line of standard input, a line with the nanoseconds since the epoch.
pub(crate) fn read() {
    for line in std::io::stdin().lock().lines() {
        line.expect("standard input");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a time since 1970");
        let mut out = std::io::stdout();
        writeln!(out, "{}", now.as_nanos()).and_then(|()| out.flush()).expect("standard output");
    }
}

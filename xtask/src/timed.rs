//! Output of a test program, and when each line of it came.

use std::time::{Duration, Instant};

/// Tests that take less are not worth a word.
const WORTH_TELLING: Duration = Duration::from_millis(100);

/// Lines of output with their times. With one test at a time, the time from the end of one line to the
/// end of the next is that of a test.
#[derive(Debug)]
pub(crate) struct Timed {
    bytes: Vec<u8>,
    /// For each line, where it ends and how long after the line before it.
    lines: Vec<(usize, Duration)>,
    last: Instant,
}

impl Timed {
    /// Nothing yet.
    pub(crate) fn new() -> Self {
        Self { bytes: Vec::new(), lines: Vec::new(), last: Instant::now() }
    }

    /// Takes the next piece, which has come just now.
    pub(crate) fn push(&mut self, piece: &[u8]) {
        let now = Instant::now();
        for (at, _) in piece.iter().enumerate().filter(|(_, byte)| **byte == b'\n') {
            self.lines.push((self.bytes.len() + at, now - self.last));
            self.last = now;
        }
        self.bytes.extend_from_slice(piece);
    }

    /// All of it, as it came.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// All of it, with its time behind each test's line.
    pub(crate) fn with_times(&self) -> Vec<u8> {
        let mut shown = Vec::new();
        let mut begin = 0;
        for &(end, took) in &self.lines {
            let line = &self.bytes[begin..end];
            shown.extend_from_slice(line);
            let ended = [&b" ok"[..], b" FAILED"].iter().any(|word| line.ends_with(word));
            if ended && line.starts_with(b"test ") && took >= WORTH_TELLING {
                shown.extend_from_slice(format!(" ({:.1} s)", took.as_secs_f64()).as_bytes());
            }
            shown.push(b'\n');
            begin = end + 1;
        }
        shown.extend_from_slice(&self.bytes[begin..]);
        shown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_that_took_long_have_a_time() {
        let mut timed = Timed::new();
        let pieces = ["running 2 tests\ntest a ... ", "ok\ntest b", " ... ok\nrest"];
        pieces.iter().for_each(|piece| timed.push(piece.as_bytes()));
        assert_eq!(timed.bytes(), pieces.concat().as_bytes());
        let times = [0, 2500, 3];
        for (line, ms) in timed.lines.iter_mut().zip(times) {
            line.1 = Duration::from_millis(ms);
        }
        let shown = String::from_utf8(timed.with_times()).unwrap();
        assert_eq!(shown, "running 2 tests\ntest a ... ok (2.5 s)\ntest b ... ok\nrest");
    }
}

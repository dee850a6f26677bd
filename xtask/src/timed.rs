//! Output of a test program in a lab, shown line by line with the time of each test.

use std::io::{self, Write as _, stdout};
use std::time::{Duration, Instant};

/// Shortest time of a test that is shown.
const SHOWN_FROM: Duration = Duration::from_millis(100);

/// Output of one of several programs that run at the same time. A line is shown when it is
/// complete, behind the program's name.
///
/// The program runs one test at a time, so the time of a test is the time between two line ends.
#[derive(Debug)]
pub(crate) struct Timed {
    name: String,
    bytes: Vec<u8>,
    /// Offset in `bytes` of the first line that is not complete.
    begin: usize,
    /// Time of the last line end.
    last: Instant,
}

impl Timed {
    /// Empty output of the program `name`.
    pub(crate) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), bytes: Vec::new(), begin: 0, last: Instant::now() }
    }

    /// Takes a piece of output that has just arrived, and shows the lines that it completes.
    pub(crate) fn push(&mut self, piece: &[u8]) -> io::Result<()> {
        let now = Instant::now();
        let lines = self.complete(piece, now - self.last);
        if lines.is_empty() {
            return Ok(());
        }
        self.last = now;
        show(&lines)
    }

    /// Shows an unfinished last line. Returns the whole output, unchanged.
    pub(crate) fn finish(self) -> io::Result<Vec<u8>> {
        if self.begin < self.bytes.len() {
            show(&self.line(&self.bytes[self.begin..], Duration::ZERO))?;
        }
        Ok(self.bytes)
    }

    /// Appends `piece`. Returns the lines that it completes, as shown; the first one took `took`.
    fn complete(&mut self, piece: &[u8], mut took: Duration) -> Vec<u8> {
        self.bytes.extend_from_slice(piece);
        let mut shown = Vec::new();
        while let Some(length) = self.bytes[self.begin..].iter().position(|byte| *byte == b'\n') {
            let end = self.begin + length;
            shown.extend(self.line(&self.bytes[self.begin..end], took));
            self.begin = end + 1;
            took = Duration::ZERO;
        }
        shown
    }

    /// One line as shown: behind the name, with `took` if it is the result of a test.
    fn line(&self, line: &[u8], took: Duration) -> Vec<u8> {
        let mut shown = format!("{}: ", self.name).into_bytes();
        shown.extend_from_slice(line);
        let ended = [&b" ok"[..], b" FAILED"].iter().any(|word| line.ends_with(word));
        if ended && line.starts_with(b"test ") && took >= SHOWN_FROM {
            shown.extend_from_slice(format!(" ({:.1} s)", took.as_secs_f64()).as_bytes());
        }
        shown.push(b'\n');
        shown
    }
}

/// Writes `lines` under one lock of standard output: lines of two programs must not mix.
fn show(lines: &[u8]) -> io::Result<()> {
    let mut out = stdout().lock();
    out.write_all(lines)?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complete_lines_are_shown_and_tests_that_took_long_have_a_time() {
        let mut timed = Timed::new("exec");
        let mut push = |piece: &str, ms| {
            let lines = timed.complete(piece.as_bytes(), Duration::from_millis(ms));
            String::from_utf8(lines).unwrap()
        };
        assert_eq!(push("running 2 tests\ntest a ... ", 0), "exec: running 2 tests\n");
        assert_eq!(push("ok\ntest b", 2500), "exec: test a ... ok (2.5 s)\n");
        assert_eq!(push(" ... ok\nrest", 3), "exec: test b ... ok\n");
        let bytes = timed.finish().unwrap();
        assert_eq!(bytes, b"running 2 tests\ntest a ... ok\ntest b ... ok\nrest");
    }
}

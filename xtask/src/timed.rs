//! Output of a test program in a lab, shown line by line, with the time of each test.

use std::io::{self, Write as _, stdout};
use std::time::{Duration, Instant};

/// Tests that take less are not worth a word.
const WORTH_TELLING: Duration = Duration::from_millis(100);

/// Output of a program beside which others run: each line is shown when it is complete, behind the
/// program's name. With one test at a time, a test's time is that from the end of one line to the end of
/// the next.
#[derive(Debug)]
pub(crate) struct Timed {
    name: String,
    bytes: Vec<u8>,
    /// Where the line begins that is not complete yet.
    begin: usize,
    last: Instant,
}

impl Timed {
    /// Nothing yet of the program called `name`.
    pub(crate) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), bytes: Vec::new(), begin: 0, last: Instant::now() }
    }

    /// Takes the next piece, which has come just now, and shows what it completes.
    pub(crate) fn push(&mut self, piece: &[u8]) -> io::Result<()> {
        let now = Instant::now();
        let lines = self.complete(piece, now - self.last);
        if lines.is_empty() {
            return Ok(());
        }
        self.last = now;
        show(&lines)
    }

    /// Shows a last line without an end, and gives back all of it as it came.
    pub(crate) fn finish(self) -> io::Result<Vec<u8>> {
        if self.begin < self.bytes.len() {
            show(&self.line(&self.bytes[self.begin..], Duration::ZERO))?;
        }
        Ok(self.bytes)
    }

    /// The lines that `piece` completes, the first of which took `took`, as they are shown.
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

    fn line(&self, line: &[u8], took: Duration) -> Vec<u8> {
        let mut shown = format!("{}: ", self.name).into_bytes();
        shown.extend_from_slice(line);
        let ended = [&b" ok"[..], b" FAILED"].iter().any(|word| line.ends_with(word));
        if ended && line.starts_with(b"test ") && took >= WORTH_TELLING {
            shown.extend_from_slice(format!(" ({:.1} s)", took.as_secs_f64()).as_bytes());
        }
        shown.push(b'\n');
        shown
    }
}

/// In one piece, lest lines of two programs mix.
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

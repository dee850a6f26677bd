//! `logs`: prints the log of a container's guest.

use std::{
    fs::File,
    io::{ErrorKind, Read, Seek, SeekFrom},
    time::Duration,
};

use clap::Args;

use crate::{
    cli::{Global, all_roots, print},
    error::{Error, Explain, Result},
    state::CONSOLE_LOG,
    text::printable,
};

/// Most bytes that are read at once. The VMM writes 16 MiB at most.
const CHUNK: u64 = 64 << 10;

/// Most bytes of a line. [`printable`] shows fewer.
const MAX_LINE: usize = 16 << 10;

/// Time between two looks at a log that is followed.
const LOOK: Duration = Duration::from_millis(200);

#[derive(Debug, Args)]
pub(super) struct Logs {
    /// Print the console of the guest's kernel, which `--debug` at the creation keeps. It is the
    /// only log that isopod has: the caller has the container's output.
    #[arg(long)]
    guest: bool,
    /// Go on until the sandbox has ended.
    #[arg(short, long)]
    follow: bool,
    /// Begin with the last LINES lines.
    #[arg(short = 'n', long, value_name = "LINES")]
    tail: Option<usize>,
    /// Id of a container, of any in the microVM.
    id: String,
}

impl Logs {
    pub(super) fn run(self, global: &Global) -> Result<u8> {
        let found = all_roots::find(global, &self.id)?;
        let id = &found.record.id;
        if !self.guest {
            return Err(Error::new(format!(
                "isopod keeps no output of container {id}: ask the engine that has made it, or \
                 give --guest for the log of its guest"
            )));
        }
        let (dir, owner) = match &found.record.pod {
            Some(pod) => (pod.dir.clone(), pod.process),
            None => (found.dir.path().to_owned(), found.record.sandbox),
        };
        let path = dir.join(CONSOLE_LOG);
        let mut file = File::open(&path).map_err(|e| match e.kind() {
            ErrorKind::NotFound => Error::new(format!(
                "there is no log of the guest of container {id}: it is kept if the first \
                 container of the microVM is created with --debug"
            )),
            _ => Error::because(format!("cannot open {}", path.display()), e),
        })?;
        let mut lines = Lines::default();
        if let Some(tail) = self.tail {
            let begin = begin_of_last(&mut file, tail);
            begin.explain(|| format!("cannot read {}", path.display()))?;
        }
        let mut ended = !self.follow;
        loop {
            let mut chunk = Vec::new();
            while (&file)
                .take(CHUNK)
                .read_to_end(&mut chunk)
                .explain(|| format!("cannot read {}", path.display()))?
                > 0
            {
                print(&lines.whole(&chunk))?;
                chunk.clear();
            }
            if ended {
                return print(&lines.rest()).map(|()| 0);
            }
            // The next look reads all that was written by the end.
            ended = owner.wait(LOOK);
        }
    }
}

/// Moves to the begin of the last `lines` lines.
fn begin_of_last(file: &mut File, lines: usize) -> std::io::Result<()> {
    // The VMM bounds the file.
    let mut text = Vec::new();
    file.read_to_end(&mut text)?;
    let whole = text.strip_suffix(b"\n").unwrap_or(&text);
    let mut begin = text.len();
    if lines > 0 {
        let ends = whole.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n');
        begin = ends.map(|(at, _)| at + 1).nth(lines - 1).unwrap_or(0);
    }
    file.seek(SeekFrom::Start(begin as u64)).map(drop)
}

/// Makes lines of what the guest has written, safe for a terminal.
#[derive(Default)]
struct Lines(Vec<u8>);

impl Lines {
    /// The lines that end in these bytes. The rest is kept.
    fn whole(&mut self, bytes: &[u8]) -> String {
        let mut text = String::new();
        for byte in bytes {
            match byte {
                b'\n' => text.push_str(&self.end()),
                _ if self.0.len() < MAX_LINE => self.0.push(*byte),
                _ => {}
            }
        }
        text
    }

    /// The line that has not ended yet, if there is one.
    fn rest(&mut self) -> String {
        if self.0.is_empty() { String::new() } else { self.end() }
    }

    fn end(&mut self) -> String {
        let line = std::mem::take(&mut self.0);
        let line = String::from_utf8_lossy(&line);
        format!("{}\n", printable(line.trim_end_matches('\r')))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn lines_are_whole_and_safe() {
        let mut lines = Lines::default();
        assert_eq!(lines.whole(b"one\r\n\x1b[2Jtw"), "one\n");
        assert_eq!(lines.whole(b"o\nlast"), " [2Jtwo\n");
        assert_eq!((lines.rest(), lines.rest()), ("last\n".into(), String::new()));
        assert_eq!(lines.whole(b"\n\n"), "\n\n");
        lines.whole(&vec![b'x'; 3 * MAX_LINE]);
        assert!(lines.0.len() == MAX_LINE && lines.rest().len() < MAX_LINE);
    }

    #[test]
    fn the_last_lines_are_found() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"a\nb\nc\n").unwrap();
        for (lines, expected) in [(0, ""), (1, "c\n"), (2, "b\nc\n"), (9, "a\nb\nc\n")] {
            file.rewind().unwrap();
            begin_of_last(&mut file, lines).unwrap();
            let mut text = String::new();
            file.read_to_string(&mut text).unwrap();
            assert_eq!(text, expected);
        }
    }
}

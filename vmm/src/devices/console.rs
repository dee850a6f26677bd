//! The guest kernel's early console: a serial port that only sends.
//!
//! A quiet kernel writes here only what went wrong, so the port costs nothing in a normal boot, and
//! a panic before any driver is up still reaches the host.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use vm_superio::{Serial, Trigger, serial::NoEvents};

use crate::bus::BusDevice;

/// Lines kept for error reports.
const TAIL_LINES: usize = 40;

/// Longest line kept, in bytes; the rest of a longer one is dropped.
const LINE_LEN: usize = 240;

/// Most bytes that go to the log file in the life of a microVM, so that a guest cannot fill a disk.
const FILE_LEN: u64 = 16 << 20;

/// The console output of one guest: its last lines, and a copy to a file if there is one.
#[derive(Default)]
pub struct ConsoleLog {
    lines: VecDeque<String>,
    line: Vec<u8>,
    file: Option<File>,
    file_len: u64,
    panicked: bool,
}

impl ConsoleLog {
    /// A log that also goes to `file`.
    pub fn new(file: Option<File>) -> Self {
        Self { file, ..Self::default() }
    }

    /// The last lines, oldest first, without control characters.
    pub fn tail(&self) -> Vec<String> {
        let unfinished = (!self.line.is_empty()).then(|| printable(&self.line));
        self.lines.iter().cloned().chain(unfinished).collect()
    }

    /// The guest's kernel said that it panicked.
    pub fn panicked(&self) -> bool {
        self.panicked
    }

    fn push(&mut self, byte: u8) {
        match byte {
            b'\r' => {}
            b'\n' => self.end_line(),
            _ if self.line.len() < LINE_LEN => self.line.push(byte),
            _ => {}
        }
    }

    fn end_line(&mut self) {
        let line = printable(&self.line);
        self.line.clear();
        self.panicked |= line.contains("Kernel panic - not syncing");
        if self.lines.len() == TAIL_LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }
}

impl Write for ConsoleLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        bytes.iter().for_each(|b| self.push(*b));
        if let Some(file) = &mut self.file
            && self.file_len < FILE_LEN
        {
            self.file_len += bytes.len() as u64;
            // The log is an aid; a full disk must not take the guest down.
            let _ = file.write_all(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn printable(line: &[u8]) -> String {
    String::from_utf8_lossy(line).chars().map(|c| if c.is_control() { '.' } else { c }).collect()
}

/// A [`ConsoleLog`] that the serial port writes and the main thread reads.
#[derive(Clone)]
pub struct SharedLog(Arc<Mutex<ConsoleLog>>);

impl SharedLog {
    /// A log that also goes to `file`.
    pub fn new(file: Option<File>) -> Self {
        Self(Arc::new(Mutex::new(ConsoleLog::new(file))))
    }

    /// See [`ConsoleLog::tail`] and [`ConsoleLog::panicked`].
    pub fn snapshot(&self) -> (Vec<String>, bool) {
        let log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (log.tail(), log.panicked())
    }
}

impl Write for SharedLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The early console polls; nobody waits for its interrupt.
struct NoInterrupt;

impl Trigger for NoInterrupt {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        Ok(())
    }
}

/// The serial port itself.
pub struct SerialConsole(Serial<NoInterrupt, NoEvents, SharedLog>);

impl SerialConsole {
    /// A port that writes to `log`.
    pub fn new(log: SharedLog) -> Self {
        Self(Serial::new(NoInterrupt, log))
    }
}

impl BusDevice for SerialConsole {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let [byte] = data {
            *byte = self.0.read(offset as u8);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let [byte] = data {
            // Neither the log nor the missing interrupt can fail.
            let _ = self.0.write(offset as u8, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_bounded_and_harmless() {
        let mut log = ConsoleLog::default();
        for n in 0..1000 {
            writeln!(log, "line {n} \x1b[31m{}\r", "x".repeat(1000)).unwrap();
        }
        write!(log, "unfinished").unwrap();
        let tail = log.tail();
        assert_eq!(tail.len(), TAIL_LINES + 1);
        assert!(tail[0].starts_with("line 960 .[31mxxx") && tail[0].len() <= LINE_LEN);
        assert_eq!(tail[TAIL_LINES], "unfinished");
        assert!(!log.panicked());
        writeln!(log, "\n[    0.1] Kernel panic - not syncing: VFS").unwrap();
        assert!(log.panicked());
    }
}

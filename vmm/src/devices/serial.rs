//! The guest kernel's early console: a serial port that only sends.
//!
//! A quiet kernel writes only its errors here, so the port costs nothing in a normal boot. A panic
//! before any driver is up still reaches the host.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use vm_superio::{Serial, Trigger, serial::NoEvents};

use crate::bus::BusDevice;
use crate::sync::lock;
use crate::text::is_showable;

/// Number of lines kept for error reports.
const TAIL_LINES: usize = 40;

/// Longest line kept, in bytes. The rest of a longer line is dropped.
const LINE_LEN: usize = 240;

/// Most bytes written to the log file in the life of a microVM, so that a guest cannot fill a disk.
const FILE_LEN: u64 = 16 << 20;

/// The last lines of a guest's console output.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleLog {
    lines: VecDeque<String>,
    line: Vec<u8>,
    panicked: bool,
}

impl ConsoleLog {
    /// Returns the last lines, oldest first, without control and format characters.
    pub fn tail(&self) -> Vec<String> {
        let unfinished = (!self.line.is_empty()).then(|| printable(&self.line));
        self.lines.iter().cloned().chain(unfinished).collect()
    }

    /// Returns true once the guest's kernel has reported a panic.
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

fn printable(line: &[u8]) -> String {
    String::from_utf8_lossy(line).chars().map(|c| if is_showable(c) { c } else { '.' }).collect()
}

/// A copy of the output in a file.
#[derive(Default)]
struct LogFile {
    file: Option<File>,
    len: u64,
}

impl LogFile {
    fn write(&mut self, bytes: &[u8]) {
        if let Some(file) = &mut self.file
            && self.len < FILE_LEN
        {
            self.len += bytes.len() as u64;
            // A full disk must not stop the guest: the log is only an aid.
            let _ = file.write_all(bytes);
        }
    }
}

/// A [`ConsoleLog`], and its copy in a file. The serial port writes both, the main thread reads the
/// log.
///
/// The two have separate locks. A reader of the file that sleeps may block the port for any time,
/// and the main thread must still get the last lines.
#[derive(Clone, Default)]
pub struct SharedLog {
    log: Arc<Mutex<ConsoleLog>>,
    copy: Arc<Mutex<LogFile>>,
}

impl SharedLog {
    /// Creates a log, with a copy in `file`.
    pub fn new(file: Option<File>) -> Self {
        Self { log: Arc::default(), copy: Arc::new(Mutex::new(LogFile { file, len: 0 })) }
    }

    /// Returns [`ConsoleLog::tail`] and [`ConsoleLog::panicked`].
    pub fn snapshot(&self) -> (Vec<String>, bool) {
        let log = lock(&self.log);
        (log.tail(), log.panicked())
    }
}

impl Write for SharedLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut log = lock(&self.log);
        bytes.iter().for_each(|b| log.push(*b));
        drop(log);
        lock(&self.copy).write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An interrupt that does nothing, because the early console polls.
struct NoInterrupt;

impl Trigger for NoInterrupt {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        Ok(())
    }
}

/// The registers of the serial port, and its output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// Divisor latch, low and high byte.
    pub baud_divisor: [u8; 2],
    /// `IER`
    pub interrupt_enable: u8,
    /// `IIR`
    pub interrupt_identification: u8,
    /// `LCR`
    pub line_control: u8,
    /// `LSR`
    pub line_status: u8,
    /// `MCR`
    pub modem_control: u8,
    /// `MSR`
    pub modem_status: u8,
    /// `SCR`
    pub scratch: u8,
    /// Bytes received and not yet read.
    pub in_buffer: Vec<u8>,
    /// The last lines of the output.
    pub log: ConsoleLog,
    /// Number of bytes written to the file.
    pub file_len: u64,
}

/// The serial port.
pub struct SerialConsole(Serial<NoInterrupt, NoEvents, SharedLog>);

impl SerialConsole {
    /// Creates a port that writes to `log`.
    pub fn new(log: SharedLog) -> Self {
        Self(Serial::new(NoInterrupt, log))
    }

    /// Returns the state. The vCPUs must be paused.
    pub fn state(&self) -> ConsoleState {
        let serial = self.0.state();
        ConsoleState {
            baud_divisor: [serial.baud_divisor_low, serial.baud_divisor_high],
            interrupt_enable: serial.interrupt_enable,
            interrupt_identification: serial.interrupt_identification,
            line_control: serial.line_control,
            line_status: serial.line_status,
            modem_control: serial.modem_control,
            modem_status: serial.modem_status,
            scratch: serial.scratch,
            in_buffer: serial.in_buffer,
            log: lock(&self.0.writer().log).clone(),
            file_len: lock(&self.0.writer().copy).len,
        }
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
        let mut log = SharedLog::default();
        for n in 0..1000 {
            writeln!(log, "line {n} \x1b[31m\u{202e}{}\r", "x".repeat(1000)).unwrap();
        }
        write!(log, "unfinished").unwrap();
        let (tail, panicked) = log.snapshot();
        assert_eq!(tail.len(), TAIL_LINES + 1);
        assert!(tail[0].starts_with("line 960 .[31m.xxx") && tail[0].len() <= LINE_LEN);
        assert_eq!(tail[TAIL_LINES], "unfinished");
        assert!(!panicked);
        writeln!(log, "\n[    0.1] Kernel panic - not syncing: VFS").unwrap();
        assert!(log.snapshot().1);
    }

    #[test]
    fn a_reader_that_sleeps_does_not_hide_the_last_lines() {
        let (reader, writer) = std::os::unix::net::UnixStream::pair().unwrap();
        let log = SharedLog::new(Some(File::from(std::os::fd::OwnedFd::from(writer))));
        let mut port = log.clone();
        let vcpu = std::thread::spawn(move || {
            writeln!(port, "last words").unwrap();
            // More bytes than a socket buffers.
            port.write_all(&vec![b'x'; 8 << 20]).unwrap();
        });
        while log.snapshot().0.len() < 2 {
            std::thread::yield_now();
        }
        assert_eq!(log.snapshot().0[0], "last words");
        drop(reader);
        vcpu.join().unwrap();
    }

    #[test]
    fn the_port_can_be_written_down() {
        let mut port = SerialConsole::new(SharedLog::new(Some(tempfile::tempfile().unwrap())));
        port.write(7, &[0x5a]);
        for byte in b"first\nsec" {
            port.write(0, &[*byte]);
        }
        let state = port.state();
        let json = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<ConsoleState>(&json).unwrap(), state);
        assert_eq!((state.scratch, state.file_len), (0x5a, 9));
        assert_eq!(state.log.tail(), ["first", "sec"]);
    }
}

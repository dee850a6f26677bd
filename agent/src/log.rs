//! Messages to the kernel log, which is the only log a guest has.
//!
//! The kernel prints errors on the console even under `quiet`, so they reach the host's console
//! log. `/dev/kmsg` is rate-limited by the kernel, so a flood here cannot become one there.

use std::fmt;
use std::fs::File;
use std::io::Write as _;
use std::sync::OnceLock;

static KMSG: OnceLock<File> = OnceLock::new();

/// Opens the kernel log. Before this, and where there is none, messages go to standard error.
pub(crate) fn open() {
    if let Ok(file) = File::options().write(true).open("/dev/kmsg") {
        let _ = KMSG.set(file);
    }
}

/// Something failed that the host has to hear about.
pub(crate) fn error(message: fmt::Arguments<'_>) {
    write(3, message);
}

/// Something was not done as asked, and the sandbox goes on.
pub(crate) fn warn(message: fmt::Arguments<'_>) {
    write(4, message);
}

fn write(level: u8, message: fmt::Arguments<'_>) {
    // One write is one record. A log that cannot be written has nowhere to be reported.
    let record = format!("<{level}>isopod-agent: {message}\n");
    let _ = match KMSG.get() {
        Some(mut kmsg) => kmsg.write_all(record.as_bytes()),
        None => std::io::stderr().write_all(record.as_bytes()),
    };
}

macro_rules! log_error { ($($arg:tt)*) => { $crate::log::error(format_args!($($arg)*)) } }
macro_rules! log_warn { ($($arg:tt)*) => { $crate::log::warn(format_args!($($arg)*)) } }
pub(crate) use {log_error, log_warn};

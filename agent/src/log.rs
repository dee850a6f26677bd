//! Messages to the kernel log, the only log of a guest.
//!
//! The kernel prints errors on the console even under `quiet`, so they reach the host's console
//! log. It also limits the rate of `/dev/kmsg`, so a flood here cannot become a flood there.

use std::fmt;
use std::fs::File;
use std::io::Write as _;
use std::sync::OnceLock;

static KMSG: OnceLock<File> = OnceLock::new();

/// Opens the kernel log. Before this call, or without a kernel log, messages go to standard error.
pub(crate) fn open() {
    if let Ok(file) = File::options().write(true).open("/dev/kmsg") {
        let _ = KMSG.set(file);
    }
}

/// Logs a failure that the host has to know about.
pub(crate) fn error(message: fmt::Arguments<'_>) {
    write(3, message);
}

/// Logs a deviation from the request that does not stop the sandbox.
pub(crate) fn warn(message: fmt::Arguments<'_>) {
    write(4, message);
}

fn write(level: u8, message: fmt::Arguments<'_>) {
    // One write is one record. A failed write cannot be reported anywhere.
    let record = format!("<{level}>isopod-agent: {message}\n");
    let _ = match KMSG.get() {
        Some(mut kmsg) => kmsg.write_all(record.as_bytes()),
        None => std::io::stderr().write_all(record.as_bytes()),
    };
}

macro_rules! log_error { ($($arg:tt)*) => { $crate::log::error(format_args!($($arg)*)) } }
macro_rules! log_warn { ($($arg:tt)*) => { $crate::log::warn(format_args!($($arg)*)) } }
pub(crate) use {log_error, log_warn};

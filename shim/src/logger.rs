//! The log as runc's callers read it: one line a record, as text or as JSON with `level`, `msg` and
//! `time`.
//!
//! Without `--log`, only warnings, errors and (with `--debug`) debug records are shown, on standard
//! error. With `--log`, all records go to the file. Warnings and errors are for the person too, so
//! they still show on standard error.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    sync::OnceLock,
};

use log::{Level, LevelFilter, Log, Metadata, Record};
use serde::{Deserialize, Serialize};

use crate::error::{Explain, Result};

/// Form of a log line, as runc's `--log-format`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// `time="..." level=... msg="..."`
    #[default]
    Text,
    /// `{"level":"...","msg":"...","time":"..."}`
    Json,
}

/// Target of warnings for the log file. Standard error gets them only with `--debug`.
pub const FOR_THE_LOG: &str = "isopod::for_the_log";

struct Logger {
    file: Option<File>,
    format: Format,
    debug: bool,
}

static LOGGER: OnceLock<Logger> = OnceLock::new();

/// Opens the file given by `--log` for appending.
pub fn open(path: &Path) -> Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .explain(|| format!("cannot open the log file {}", path.display()))
}

/// Sets up the log of this process. Later calls change nothing.
pub fn init(file: Option<File>, format: Format, debug: bool) {
    let logger = LOGGER.get_or_init(|| Logger { file, format, debug });
    // This fails only if a logger is set already, and then it is this logger.
    if log::set_logger(logger).is_ok() {
        log::set_max_level(if debug { LevelFilter::Debug } else { LevelFilter::Info });
    }
}

/// The descriptor of the log file, if there is one.
pub fn file() -> Option<BorrowedFd<'static>> {
    LOGGER.get().and_then(|logger| logger.file.as_ref()).map(AsFd::as_fd)
}

/// The form of this process's log lines, and whether debug records are wanted.
pub fn options() -> (Format, bool) {
    LOGGER.get().map_or((Format::Text, false), |logger| (logger.format, logger.debug))
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Records of libraries are for the authors of the libraries.
        metadata.target().starts_with("isopod") && (self.debug || metadata.level() <= Level::Info)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let message = record.args().to_string();
        if let Some(file) = &self.file {
            write_record(file, self.format, record.level(), &message);
        }
        let shown = match record.level() {
            // Most containers have such a warning, so a terminal is not the place for it.
            Level::Warn if record.target() == FOR_THE_LOG && !self.debug => None,
            Level::Error => Some("isopod: "),
            Level::Warn => Some("isopod: warning: "),
            Level::Debug if self.file.is_none() => Some("isopod: debug: "),
            _ => None,
        };
        if let Some(prefix) = shown {
            let _ = io::stderr().write_all(format!("{prefix}{message}\n").as_bytes());
        }
    }

    fn flush(&self) {}
}

/// Writes an error to a log file that is not this process's log.
pub(crate) fn record_error(file: &File, format: Format, message: &str) {
    write_record(file, format, Level::Error, message);
}

fn write_record(mut file: &File, format: Format, level: Level, message: &str) {
    // One write, so that lines of several processes do not mix. If the log cannot be written, there
    // is nowhere to report it.
    let _ = file.write_all(line(format, level, message).as_bytes());
}

fn line(format: Format, level: Level, message: &str) -> String {
    let level = match level {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug | Level::Trace => "debug",
    };
    let time = humantime::format_rfc3339_seconds(std::time::SystemTime::now());
    match format {
        Format::Json => {
            let record = serde_json::json!({
                "level": level, "msg": message, "time": time.to_string(),
            });
            format!("{record}\n")
        }
        Format::Text => format!("time=\"{time}\" level={level} msg={message:?}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_lines_have_the_three_keys_that_callers_read() {
        let line = line(Format::Json, Level::Error, "a \"b\"\nc");
        assert!(line.ends_with('\n') && line.matches('\n').count() == 1);
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["level"], "error");
        assert_eq!(value["msg"], "a \"b\"\nc");
        assert!(value["time"].as_str().unwrap().ends_with('Z'));
    }

    #[test]
    fn text_lines_stay_one_line() {
        let line = line(Format::Text, Level::Warn, "a\nb");
        assert!(line.contains("level=warning msg=\"a\\nb\""), "{line}");
    }
}

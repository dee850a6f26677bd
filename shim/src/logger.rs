//! The log as runc's callers read it: one line a record, as text or as JSON with `level`, `msg` and
//! `time`.
//!
//! Without `--log`, only warnings, errors and (with `--debug`) debug records are shown, on standard
//! error. With `--log`, all records go to the file. Warnings and errors are for the person too, so
//! they still show on standard error.
//!
//! Records of a process that owns a sandbox name it in the field `sandbox`. The field `container`
//! names the container that the work is about ([`about`]). A task or thread that the work starts is
//! about the same container only if it is told so ([`inherit`], [`Subject::run`]).

use std::{
    fs::{File, OpenOptions},
    future::Future,
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

/// The sandbox that this process owns a part of.
static SANDBOX: OnceLock<String> = OnceLock::new();

tokio::task_local! {
    static CONTAINER: String;
}

/// Names the sandbox that all records of this process are about. Later calls change nothing.
pub(crate) fn set_sandbox(id: &str) {
    SANDBOX.get_or_init(|| id.to_owned());
}

/// Does work about a container.
pub(crate) async fn about<T>(container: &str, work: impl Future<Output = T>) -> T {
    CONTAINER.scope(container.to_owned(), work).await
}

/// Has work, which is to run as a task of its own, be about the container that the caller's work is
/// about.
pub(crate) fn inherit<F: Future>(work: F) -> impl Future<Output = F::Output> {
    let subject = Subject::now();
    async move {
        match subject.0 {
            Some(container) => CONTAINER.scope(container, work).await,
            None => work.await,
        }
    }
}

/// The container that some work is about, if it is about one.
#[derive(Debug, Clone)]
pub(crate) struct Subject(Option<String>);

impl Subject {
    /// The container that the caller's work is about.
    pub(crate) fn now() -> Self {
        Self(CONTAINER.try_with(String::clone).ok())
    }

    /// A container.
    pub(crate) fn of(container: &str) -> Self {
        Self(Some(container.to_owned()))
    }

    /// Does work about this container on the calling thread.
    pub(crate) fn run<T>(self, work: impl FnOnce() -> T) -> T {
        match self.0 {
            Some(container) => CONTAINER.sync_scope(container, work),
            None => work(),
        }
    }
}

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
            let subject = Subject::now();
            let sandbox = SANDBOX.get().map(String::as_str);
            let fields = [("sandbox", sandbox), ("container", subject.0.as_deref())];
            write_record(file, self.format, record.level(), &message, fields);
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
    write_record(file, format, Level::Error, message, [("sandbox", None), ("container", None)]);
}

/// Names and values of the fields behind the message.
type Fields<'a> = [(&'static str, Option<&'a str>); 2];

fn write_record(mut file: &File, format: Format, level: Level, message: &str, fields: Fields<'_>) {
    // One write, so that lines of several processes do not mix. If the log cannot be written, there
    // is nowhere to report it.
    let _ = file.write_all(line(format, level, message, fields).as_bytes());
}

fn line(format: Format, level: Level, message: &str, fields: Fields<'_>) -> String {
    let level = match level {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug | Level::Trace => "debug",
    };
    let time = humantime::format_rfc3339_seconds(std::time::SystemTime::now());
    let fields = fields.into_iter().filter_map(|(name, value)| value.map(|value| (name, value)));
    match format {
        Format::Json => {
            let mut record = serde_json::json!({
                "level": level, "msg": message, "time": time.to_string(),
            });
            for (name, value) in fields {
                record[name] = value.into();
            }
            format!("{record}\n")
        }
        Format::Text => {
            // Ids have no character that needs quotes.
            let fields: String = fields.map(|(name, value)| format!(" {name}={value}")).collect();
            format!("time=\"{time}\" level={level} msg={message:?}{fields}\n")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Fields<'_> = [("sandbox", None), ("container", None)];

    #[test]
    fn json_lines_have_the_three_keys_that_callers_read() {
        let line = line(Format::Json, Level::Error, "a \"b\"\nc", NONE);
        assert!(line.ends_with('\n') && line.matches('\n').count() == 1);
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["level"], "error");
        assert_eq!(value["msg"], "a \"b\"\nc");
        assert!(value["time"].as_str().unwrap().ends_with('Z'));
    }

    #[test]
    fn text_lines_stay_one_line() {
        let line = line(Format::Text, Level::Warn, "a\nb", NONE);
        assert!(line.ends_with("level=warning msg=\"a\\nb\"\n"), "{line}");
    }

    #[test]
    fn fields_name_what_a_line_is_about() {
        let fields = [("sandbox", Some("pod")), ("container", Some("web"))];
        let text = line(Format::Text, Level::Warn, "a", fields);
        assert!(text.ends_with("msg=\"a\" sandbox=pod container=web\n"), "{text}");
        let json: serde_json::Value =
            serde_json::from_str(&line(Format::Json, Level::Warn, "a", fields)).unwrap();
        assert_eq!((&json["sandbox"], &json["container"]), (&"pod".into(), &"web".into()));
    }

    #[test]
    fn work_that_is_passed_on_is_about_the_same_container() {
        let now = || Subject::now().0;
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let web = Some("web".to_owned());
        runtime.block_on(about("web", async {
            assert_eq!(now(), web);
            assert_eq!(tokio::spawn(async move { now() }).await.unwrap(), None);
            assert_eq!(tokio::spawn(inherit(async move { now() })).await.unwrap(), web);
            let subject = Subject::now();
            assert_eq!(std::thread::spawn(move || subject.run(now)).join().unwrap(), web);
        }));
        assert_eq!(Subject::of("web").run(now), web);
        assert_eq!(now(), None);
    }
}

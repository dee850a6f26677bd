//! Mistakes on the command line, for the log file: callers such as containerd read only that file.

use std::{ffi::OsString, path::PathBuf};

use clap::ValueEnum;

use crate::logger;

/// Writes a usage error to the log file that the command line names, if any. Standard error already
/// has the error, with the usage.
pub(super) fn log(error: &clap::Error) {
    let (file, format) = options(std::env::args_os().skip(1));
    // If the log cannot be opened, the error is on standard error only.
    let Some(Ok(file)) = file.as_deref().map(logger::open) else { return };
    logger::record_error(&file, format, &message(&error.to_string()));
}

/// Finds the log options among arguments that do not parse. The verb is not known, so an option
/// behind the program of `exec` counts too.
fn options(arguments: impl Iterator<Item = OsString>) -> (Option<PathBuf>, logger::Format) {
    let (mut file, mut format) = (None, logger::Format::default());
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        let Some(text) = argument.to_str() else { continue };
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(OsString::from(value))),
            None => (text, None),
        };
        match name {
            "--" => break,
            "--log" => file = value.or_else(|| arguments.next()).map(PathBuf::from).or(file),
            "--log-format" => {
                let value = value.or_else(|| arguments.next());
                let named = value.as_ref().and_then(|value| value.to_str());
                let known = named.and_then(|named| logger::Format::from_str(named, false).ok());
                format = known.unwrap_or(format);
            }
            _ => {}
        }
    }
    (file, format)
}

/// The first paragraph on one line. The tips and the usage after it are left out.
fn message(text: &str) -> String {
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let lines = text.lines().map(str::trim).take_while(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_log_option_counts_wherever_it_is() {
        let of = |arguments: &[&str]| options(arguments.iter().map(OsString::from));
        let (file, format) = of(&["--log", "/a", "run", "--log=/b", "--log-format", "json", "-x"]);
        assert_eq!((file, format), (Some("/b".into()), logger::Format::Json));
        assert_eq!(of(&["run", "-x", "--", "--log", "/a"]).0, None);
        assert_eq!(of(&["run", "--log"]).0, None);
    }

    #[test]
    fn a_record_is_one_line() {
        let text = "error: unexpected argument '--x' found\n\n  tip: y\n\nUsage: z\n";
        assert_eq!(message(text), "unexpected argument '--x' found");
    }
}

//! The agent's error type: a message for a person, and the kind of failure.

use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

/// Kind of a failure, with the meaning that agent.proto gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Code {
    /// The program to run, or the named container or process, does not exist.
    NotFound,
    /// The program to run is not executable.
    PermissionDenied,
    /// The container or process is in the wrong state for the call.
    FailedPrecondition,
    /// The specification asks for something that this agent cannot do.
    InvalidArgument,
    /// Any other failure.
    Internal,
}

/// A failure, reported once with all of its context.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Error {
    pub(crate) code: Code,
    pub(crate) message: String,
}

/// Result of the agent's fallible functions.
pub(crate) type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(Code::Internal, message)
    }

    /// The error of a field that cannot be honoured, by its name in config.json.
    pub(crate) fn invalid(field: impl fmt::Display, why: impl fmt::Display) -> Self {
        Self::new(Code::InvalidArgument, format!("{field}: {why}"))
    }

    pub(crate) fn state(message: impl Into<String>) -> Self {
        Self::new(Code::FailedPrecondition, message)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// Adds the failed operation to an I/O error.
pub(crate) trait Context<T> {
    fn context<S: fmt::Display>(self, what: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context<S: fmt::Display>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| Error::internal(format!("{}: {}", what(), reason(&e.into()))))
    }
}

/// The text of an I/O error without the number that `io::Error` appends, which means nothing to
/// most readers.
pub(crate) fn reason(e: &io::Error) -> String {
    let text = e.to_string();
    match text.rfind(" (os error ") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_names_the_operation_and_the_cause() {
        let failed: std::result::Result<(), _> = Err(rustix::io::Errno::NOENT);
        let e = failed.context(|| "open /x").unwrap_err();
        assert_eq!(e.message, "open /x: No such file or directory");
        assert_eq!(e.code, Code::Internal);
    }
}

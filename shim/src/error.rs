//! The error of the host's side: a line of text for a person, and the kind of failure.
//!
//! An error goes from the sandbox process to the command line as JSON, so it carries text and a
//! kind, not sources. Exit codes follow from the kind in one place: [`Error::exit_code`]. `exec`
//! has one exit code for all failures, [`EXIT_EXEC_FAILED`].

use std::{fmt, io};

use serde::{Deserialize, Serialize};

/// The kind of a failure, as far as a caller can tell failures apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// Any failure that has no kind of its own.
    Failed,
    /// The microVM ended while it was needed. The exit status of the process is unknown.
    VmLost,
    /// The container has ended, so nothing can be asked of it.
    Ended,
}

/// A failure, ready to be shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Error {
    /// The kind of failure.
    pub kind: ErrorKind,
    /// One line: what failed, with what, why, and what to do.
    pub message: String,
    /// Further lines to show below the message, such as the end of the guest's console.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<String>,
}

/// A result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Exit status of `run`, `exec` and the sandbox process if the microVM is gone and the container's
/// own exit status is unknown. A container can also exit with 255. The message and the recorded
/// state tell the two apart.
pub const EXIT_VM_LOST: u8 = 255;

/// Exit status of `exec` if it could not run the process, as with runc. The process itself can exit
/// with 1.
pub const EXIT_EXEC_FAILED: u8 = 255;

impl Error {
    /// A failure without a kind of its own.
    pub fn new(message: impl Into<String>) -> Self {
        Self::with_kind(ErrorKind::Failed, message)
    }

    /// A failure of the given kind.
    pub fn with_kind(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), details: Vec::new() }
    }

    /// A failure of a lower layer, as `what: why`.
    pub fn because(what: impl fmt::Display, cause: impl Into<Cause>) -> Self {
        Self::new(format!("{what}: {}", cause.into().0))
    }

    /// Adds lines to show below the message.
    #[must_use]
    pub fn details(mut self, details: Vec<String>) -> Self {
        self.details = details;
        self
    }

    /// The exit status of `run` and the sandbox process for this failure. As with runc, a missing
    /// program gives 1.
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            ErrorKind::Failed | ErrorKind::Ended => 1,
            ErrorKind::VmLost => EXIT_VM_LOST,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        for line in &self.details {
            write!(f, "\n  {line}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// Names the operation in which a lower layer failed.
pub trait Explain<T> {
    /// Turns the failure into `what: why`.
    fn explain(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Cause>> Explain<T> for std::result::Result<T, E> {
    fn explain(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| Error::because(what(), e))
    }
}

/// The text of a lower layer's failure, without the error number that Rust appends.
#[derive(Debug)]
pub struct Cause(String);

impl From<io::Error> for Cause {
    fn from(error: io::Error) -> Self {
        let text = error.to_string();
        let number = error.raw_os_error().map(|n| format!(" (os error {n})"));
        let text = match number.as_deref().and_then(|n| text.strip_suffix(n)) {
            Some(stripped) => stripped.to_owned(),
            None => text,
        };
        Self(lower_first(text))
    }
}

impl From<rustix::io::Errno> for Cause {
    fn from(errno: rustix::io::Errno) -> Self {
        io::Error::from(errno).into()
    }
}

impl From<serde_json::Error> for Cause {
    fn from(error: serde_json::Error) -> Self {
        Self(error.to_string())
    }
}

impl From<Error> for Cause {
    fn from(error: Error) -> Self {
        Self(error.message)
    }
}

/// Lowers the first letter, because error texts of the C library begin with a capital letter.
/// Abbreviations ("RPC ...") stay as they are.
fn lower_first(text: String) -> String {
    let mut letters = text.chars();
    match (letters.next(), letters.next()) {
        (Some(first), Some(second)) if first.is_uppercase() && second.is_lowercase() => {
            first.to_lowercase().chain(std::iter::once(second)).chain(letters).collect()
        }
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operating_system_error_reads_as_one_line() {
        let missing: io::Result<()> = Err(io::Error::from_raw_os_error(2));
        let error = missing.explain(|| "cannot open /x".into()).unwrap_err();
        assert_eq!(error.to_string(), "cannot open /x: no such file or directory");
        assert_eq!(error.exit_code(), 1);
    }

    #[test]
    fn kinds_survive_json_and_decide_the_exit_code() {
        for (kind, code) in [(ErrorKind::Failed, 1), (ErrorKind::VmLost, 255)] {
            let error = Error::with_kind(kind, "x").details(vec!["y".into()]);
            let json = serde_json::to_string(&error).unwrap();
            let back: Error = serde_json::from_str(&json).unwrap();
            assert_eq!(back, error);
            assert_eq!(back.exit_code(), code);
        }
    }
}

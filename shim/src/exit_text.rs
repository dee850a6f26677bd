//! Ends of processes in words.

use std::{os::unix::process::ExitStatusExt, process::ExitStatus};

/// The end of a process as `exit status N` or `killed by signal N`.
pub(crate) fn exit_text(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "unknown exit status".to_owned(),
    }
}

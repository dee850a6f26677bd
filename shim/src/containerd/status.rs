//! Errors as containerd reads them: a code of gRPC and a text.

use containerd_shim_protos::ttrpc::{self, Code};

use crate::error::{Error, ErrorKind};

/// Text of a kill that comes too late. Callers of runc's shim know it.
const FINISHED: &str = "process already finished";

/// An error with a code.
pub(super) fn status(code: Code, text: impl Into<String>) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, text.into()))
}

/// The error of a call that failed.
pub(super) fn failed(error: Error) -> ttrpc::Error {
    let code = match error.kind {
        ErrorKind::Failed => Code::UNKNOWN,
        ErrorKind::VmLost => Code::UNAVAILABLE,
        ErrorKind::Ended => Code::FAILED_PRECONDITION,
    };
    status(code, error.to_string())
}

/// The error of a call about a task or process that does not exist.
pub(super) fn no_such(id: &str, exec_id: &str) -> ttrpc::Error {
    let what = match exec_id {
        "" => format!("there is no task {id}"),
        _ => format!("task {id} has no process {exec_id}"),
    };
    status(Code::NOT_FOUND, what)
}

/// The error of a signal to a process that has ended.
pub(super) fn finished() -> ttrpc::Error {
    status(Code::NOT_FOUND, FINISHED)
}

/// The error of a call that asks for what there is not.
pub(super) fn unsupported(what: &str) -> ttrpc::Error {
    status(Code::UNIMPLEMENTED, format!("isopod does not support {what}"))
}

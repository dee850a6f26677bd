//! The limit of descriptors of a sandbox process: all that the host allows.
//!
//! Programs that the process executes get the limit of its caller. Some programs go through all
//! descriptors up to the limit. Programs that use select(2) cannot have more than 1024.

use std::{io, sync::OnceLock};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::error::{Explain, Result};

/// The caller's limit, kept when it was raised.
static BEFORE: OnceLock<Rlimit> = OnceLock::new();

/// Raises the soft limit of this process to the hard limit.
pub(crate) fn raise() -> Result<()> {
    let before = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: before.maximum, maximum: before.maximum };
    setrlimit(Resource::Nofile, raised)
        .explain(|| "cannot raise the limit of descriptors".into())?;
    BEFORE.get_or_init(|| before);
    Ok(())
}

/// Undoes [`raise`] for a program that is about to be executed. For use between `fork` and
/// `execve`: makes a system call and no more.
pub(crate) fn restore() -> io::Result<()> {
    match BEFORE.get() {
        Some(before) => Ok(setrlimit(Resource::Nofile, *before)?),
        None => Ok(()),
    }
}

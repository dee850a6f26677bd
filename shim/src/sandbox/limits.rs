//! The limit of descriptors of a sandbox process: all that the host allows. Programs that it executes
//! get the limit of its caller, since some go through all descriptors up to the limit, and those that
//! use select(2) cannot have more than 1024.

use std::{io, sync::OnceLock};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::error::{Explain, Result};

/// The limit of the caller, once it has been raised.
static BEFORE: OnceLock<Rlimit> = OnceLock::new();

/// Raises the soft limit of this process to the hard one.
///
/// # Errors
///
/// If the kernel refuses it.
pub(super) fn raise() -> Result<()> {
    let before = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: before.maximum, maximum: before.maximum };
    setrlimit(Resource::Nofile, raised)
        .explain(|| "cannot raise the limit of descriptors".into())?;
    BEFORE.get_or_init(|| before);
    Ok(())
}

/// Takes [`raise`] back for a program that is about to be executed. For use between `fork` and `execve`:
/// makes a system call and no more.
///
/// # Errors
///
/// If the kernel refuses it.
pub(super) fn restore() -> io::Result<()> {
    match BEFORE.get() {
        Some(before) => Ok(setrlimit(Resource::Nofile, *before)?),
        None => Ok(()),
    }
}

//! Release of standard streams that others relay.

use std::fs::File;

use crate::{
    error::{Explain, Result},
    logger,
};

/// The standard streams that this process gives up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Release {
    /// Standard input and output. Standard error stays, for messages to a person.
    InputAndOutput,
    /// All three, for a process whose caller does not stay. The caller waits for the end of
    /// standard error, as after any command that has returned.
    All,
}

impl Release {
    /// The streams to give up in a process whose caller stays. Its messages go to the log file, or
    /// to the caller if there is none.
    ///
    /// With a log file, standard error is given up too: containerd waits for the end of a standard
    /// error that it does not pass on.
    pub(crate) fn but_for_messages() -> Self {
        match logger::file() {
            Some(_) => Self::All,
            None => Self::InputAndOutput,
        }
    }
}

/// Points this process's standard streams at `/dev/null`. Other copies of them stay as they are.
///
/// So the other ends see the end of a stream when the relay closes its copy, and not only when this
/// process ends.
pub(crate) fn release(streams: Release) -> Result<()> {
    let what = || "cannot use /dev/null".to_owned();
    let null = File::options().read(true).write(true).open("/dev/null").explain(what)?;
    rustix::stdio::dup2_stdin(&null).explain(what)?;
    rustix::stdio::dup2_stdout(&null).explain(what)?;
    if streams == Release::All {
        rustix::stdio::dup2_stderr(&null).explain(what)?;
    }
    Ok(())
}

//! `checkpoint` and `restore`: refused, with an error that says so.

use clap::Args;

use crate::error::{Error, Result};

/// Any arguments that runc takes.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub(super) struct Refused {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
    _arguments: Vec<String>,
}

impl Refused {
    /// Fails: the state of a microVM cannot be saved yet.
    pub(super) fn run(self, verb: &str) -> Result<u8> {
        Err(Error::new(format!(
            "{verb} is not supported: the state of a microVM cannot be saved and restored, and CRIU \
             sees nothing of the processes in it"
        )))
    }
}

//! `man`: writes the man pages, one for each verb.

use std::path::PathBuf;

use clap::{Args, CommandFactory};

use crate::{
    cli::Cli,
    error::{Explain, Result},
};

#[derive(Debug, Args)]
pub(super) struct Man {
    /// Existing directory for the pages, as /usr/local/share/man/man1.
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

impl Man {
    pub(super) fn run(self) -> Result<u8> {
        clap_mangen::generate_to(Cli::command(), &self.dir)
            .explain(|| format!("cannot write man pages to {}", self.dir.display()))?;
        Ok(0)
    }
}

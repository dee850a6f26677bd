//! `completions`: prints the completions of a shell.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::{
    cli::{Cli, print},
    error::Result,
};

#[derive(Debug, Args)]
pub(super) struct Completions {
    /// The shell.
    shell: Shell,
}

impl Completions {
    pub(super) fn run(self) -> Result<u8> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "isopod", &mut script);
        print(&String::from_utf8_lossy(&script))?;
        Ok(0)
    }
}

//! `config`: prints a settings file with all defaults, or checks one.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::{
    bundle::check_allowed_list,
    cli::print,
    error::Result,
    settings::{self, CONFIG_FILE},
};

#[derive(Debug, Args)]
pub(super) struct Config {
    /// Check a file instead: this host's, or FILE. The exit status is 1 if it is not right.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = CONFIG_FILE)]
    check: Option<PathBuf>,
}

impl Config {
    pub(super) fn run(self) -> Result<u8> {
        let Some(path) = self.check else {
            print(&settings::default_text())?;
            return Ok(0);
        };
        if path == Path::new(CONFIG_FILE) && !path.exists() {
            print(&format!("{CONFIG_FILE} does not exist: the defaults hold\n"))?;
            return Ok(0);
        }
        check_allowed_list(&settings::check_file(&path)?)?;
        print(&format!("{}: no mistake\n", path.display()))?;
        Ok(0)
    }
}

//! `spec`: a config.json to start from.

use std::path::PathBuf;

use clap::Args;

use crate::{
    bundle::{default_spec, write_spec},
    error::Result,
};

#[derive(Debug, Args)]
pub(super) struct Spec {
    /// The bundle's directory.
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,
}

impl Spec {
    /// Writes config.json into the bundle.
    pub(super) fn run(self) -> Result<u8> {
        write_spec(&self.bundle.join("config.json"), &default_spec())?;
        Ok(0)
    }
}

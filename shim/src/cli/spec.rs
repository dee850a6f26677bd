//! `spec`: writes a config.json to start from.

use std::path::PathBuf;

use clap::Args;

use crate::{
    bundle::{default_spec, rootless_spec, write_spec},
    error::Result,
};

#[derive(Debug, Args)]
pub(super) struct Spec {
    /// The bundle's directory.
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,
    /// Give the container a user namespace, whose root is the caller outside.
    #[arg(long)]
    rootless: bool,
}

impl Spec {
    /// Writes config.json into the bundle.
    pub(super) fn run(self) -> Result<u8> {
        let spec = if self.rootless {
            let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
            rootless_spec(uid.as_raw(), gid.as_raw())
        } else {
            default_spec()
        };
        write_spec(&self.bundle.join("config.json"), &spec)?;
        Ok(0)
    }
}

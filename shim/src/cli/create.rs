//! `create`: the container exists, its process waits for `start`.

use std::path::Path;

use clap::Args;

use super::{Global, creation::CreateOptions, run::event_loop};
use crate::{error::Result, state::Id};

#[derive(Debug, Args)]
pub(super) struct Create {
    #[command(flatten)]
    options: CreateOptions,
    /// Name of the container, not in use below the root directory.
    id: String,
}

impl Create {
    pub(super) fn run(self, global: &Global) -> Result<u8> {
        let id = Id::parse(&self.id)?;
        let bundle = self.options.bundle.as_deref().unwrap_or(Path::new("."));
        // The sandbox process stays behind when this one ends.
        event_loop()?.block_on(self.options.create(global, id, bundle, None, true, true))?;
        Ok(0)
    }
}

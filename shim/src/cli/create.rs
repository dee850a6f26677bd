//! `create`: makes a container. Its process waits for `start`.

use std::path::Path;

use clap::Args;

use crate::{
    cli::{
        Global,
        create_options::{Caller, CreateOptions},
    },
    container_id::ContainerId,
    error::Result,
    event_loop::event_loop,
};

#[derive(Debug, Args)]
pub(super) struct Create {
    #[command(flatten)]
    options: CreateOptions,
    /// Id of the container, not yet in use below the root directory.
    id: String,
}

impl Create {
    pub(super) fn run(self, global: &Global) -> Result<u8> {
        let id = ContainerId::parse(&self.id)?;
        let bundle = self.options.bundle.as_deref().unwrap_or(Path::new("."));
        // The sandbox process lives on when this process ends.
        event_loop()?.block_on(self.options.create(global, id, bundle, None, Caller::Create))?;
        Ok(0)
    }
}

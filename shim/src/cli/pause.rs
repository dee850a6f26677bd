//! `pause`: pauses the processes of a container.

use clap::Args;

use crate::{
    cli::Global,
    container_id::ContainerId,
    control::ask,
    engine::{Record, Request},
    error::{Error, Result},
    state::{StateDir, Status},
};

#[derive(Debug, Args)]
pub(super) struct Pause {
    /// Id of the container.
    id: String,
}

impl Pause {
    pub(super) fn run(self, global: &Global) -> Result<u8> {
        let id = ContainerId::parse(&self.id)?;
        let dir = StateDir::open(&global.root, &id)?;
        let status = Record::read(&dir)?.map_or(Status::Creating, |record| record.current_status());
        if !matches!(status, Status::Created | Status::Running) {
            return Err(Error::new(format!(
                "cannot pause container {id}: container not running or created (it is {status})"
            )));
        }
        ask(&dir, Request::Pause)?.done(format_args!("cannot pause container {id}"))?;
        Ok(0)
    }
}

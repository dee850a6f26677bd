//! `resume`: resumes the processes of a paused container.

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
pub(super) struct Resume {
    /// Id of the container.
    id: String,
}

impl Resume {
    pub(super) fn run(self, global: &Global) -> Result<u8> {
        let id = ContainerId::parse(&self.id)?;
        let dir = StateDir::open(&global.root, &id)?;
        let status = Record::read(&dir)?.map_or(Status::Creating, |record| record.current_status());
        if status != Status::Paused {
            return Err(Error::new(format!(
                "cannot resume container {id}: container not paused (it is {status})"
            )));
        }
        ask(&dir, Request::Resume)?.done(format_args!("cannot resume container {id}"))?;
        Ok(0)
    }
}

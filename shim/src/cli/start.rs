//! `start`: starts the process of a created container.

use clap::Args;

use crate::{
    cli::Global,
    container_id::ContainerId,
    control::{ANSWER_TIMEOUT, Answer, ask_within},
    engine::{Record, Request, start_limit},
    error::{Error, Result},
    state::{StateDir, Status},
};

#[derive(Debug, Args)]
pub(super) struct Start {
    /// Id of the container.
    id: String,
}

impl Start {
    pub(super) fn run(self, global: &Global) -> Result<u8> {
        let id = ContainerId::parse(&self.id)?;
        let dir = StateDir::open(&global.root, &id)?;
        let record = Record::read(&dir)?;
        let status = record.as_ref().map_or(Status::Creating, Record::current_status);
        if status != Status::Created {
            return Err(Error::new(format!("cannot start container {id}: it is {status}")));
        }
        let limit = start_limit(record.as_ref().and_then(|record| record.hooks.as_ref()))
            .and_then(|limit| limit.checked_add(ANSWER_TIMEOUT));
        match ask_within(&dir, Request::Start, limit)? {
            Answer::Done => Ok(0),
            Answer::Gone => Err(Error::new(format!(
                "cannot start container {id}: its sandbox process has ended"
            ))),
        }
    }
}

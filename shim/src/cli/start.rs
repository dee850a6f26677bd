//! `start`: lets the process of a created container go.

use clap::Args;

use super::Global;
use crate::{
    error::{Error, Result},
    sandbox::control::{Answer, Request, ask},
    state::{Id, StateDir, Status},
};

#[derive(Debug, Args)]
pub(super) struct Start {
    /// The container.
    id: String,
}

impl Start {
    pub(super) fn run(self, global: &Global) -> Result<u8> {
        let id = Id::parse(&self.id)?;
        let dir = StateDir::open(&global.root, &id)?;
        let status = dir.record()?.map_or(Status::Creating, |record| record.current_status());
        if status != Status::Created {
            return Err(Error::new(format!("cannot start container {id}: it is {status}")));
        }
        match ask(&dir, &Request::Start)? {
            Answer::Done => Ok(0),
            Answer::Gone => Err(Error::new(format!(
                "cannot start container {id}: its sandbox process has ended"
            ))),
        }
    }
}

//! `resume`: lets the processes of a paused container go on.

use clap::Args;

use super::Global;
use crate::{
    error::{Error, Result},
    sandbox::control::{Request, ask},
    state::{Id, StateDir, Status},
};

#[derive(Debug, Args)]
pub(super) struct Resume {
    /// The container.
    id: String,
}

impl Resume {
    pub(super) fn run(self, global: &Global) -> Result<u8> {
        let id = Id::parse(&self.id)?;
        let dir = StateDir::open(&global.root, &id)?;
        let status = dir.record()?.map_or(Status::Creating, |record| record.current_status());
        if status != Status::Paused {
            return Err(Error::new(format!(
                "cannot resume container {id}: container not paused (it is {status})"
            )));
        }
        ask(&dir, &Request::Resume)?.done(format_args!("cannot resume container {id}"))?;
        Ok(0)
    }
}

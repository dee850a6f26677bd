//! `pause`: stops the processes of a container where they are.

use clap::Args;

use super::Global;
use crate::{
    error::{Error, Result},
    sandbox::control::{Request, ask},
    state::{Id, StateDir, Status},
};

#[derive(Debug, Args)]
pub(super) struct Pause {
    /// The container.
    id: String,
}

impl Pause {
    pub(super) fn run(self, global: &Global) -> Result<u8> {
        let id = Id::parse(&self.id)?;
        let dir = StateDir::open(&global.root, &id)?;
        let status = dir.record()?.map_or(Status::Creating, |record| record.current_status());
        if !matches!(status, Status::Created | Status::Running) {
            return Err(Error::new(format!(
                "cannot pause container {id}: container not running or created (it is {status})"
            )));
        }
        ask(&dir, &Request::Pause)?.done(format_args!("cannot pause container {id}"))?;
        Ok(0)
    }
}

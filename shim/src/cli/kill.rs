//! `kill`: sends a signal.

use clap::Args;

use super::Global;
use crate::{
    error::{Error, Result},
    sandbox::control::{Answer, Request, ask},
    signal,
    state::{Id, StateDir, Status},
};

#[derive(Debug, Args)]
pub(super) struct Kill {
    /// Send the signal to every process of the container.
    #[arg(short, long)]
    all: bool,
    /// The container.
    id: String,
    /// Name, with or without SIG, or number.
    #[arg(default_value = "SIGTERM")]
    signal: String,
}

impl Kill {
    pub(super) fn run(self, global: &Global) -> Result<u8> {
        let id = Id::parse(&self.id)?;
        let signal = signal::parse(&self.signal)?;
        let dir = StateDir::open(&global.root, &id)?;
        let status = dir.record()?.map_or(Status::Creating, |record| record.current_status());
        // The wording is what containerd looks for.
        let not_running =
            || Err(Error::new(format!("cannot kill container {id}: container not running")));
        match status {
            // What is paused gets it when it goes on, SIGKILL at once.
            Status::Created | Status::Running | Status::Paused => {}
            // As with runc: no process is left, so all have been reached.
            Status::Stopped if self.all => return Ok(0),
            Status::Stopped | Status::Creating => return not_running(),
        }
        match ask(&dir, &Request::Kill { signal, all: self.all })? {
            Answer::Done => Ok(0),
            Answer::Gone if self.all => Ok(0),
            Answer::Gone => not_running(),
        }
    }
}

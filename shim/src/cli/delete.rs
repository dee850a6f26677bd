//! `delete`: removes what is left of a container.

use std::time::Duration;

use clap::Args;

use super::{Global, creation::remove, run::event_loop};
use crate::{
    error::{Error, Result},
    sandbox::control::{Request, ask},
    state::{Id, Record, StateDir, Status},
};

/// How long a sandbox process may take to end its microVM in order. It gives itself less.
const END_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Debug, Args)]
pub(super) struct Delete {
    /// Kill the container if it still runs. A container that does not exist is no error then.
    #[arg(short, long)]
    force: bool,
    /// The container.
    id: String,
}

impl Delete {
    pub(super) fn run(self, global: &Global) -> Result<u8> {
        let id = Id::parse(&self.id)?;
        let dir = match StateDir::open(&global.root, &id) {
            Err(_) if self.force && !global.root.join(id.as_str()).exists() => return Ok(0),
            dir => dir?,
        };
        if let Some(record) = self.record(&dir)? {
            self.end(&dir, &record)?;
        }
        if !dir.try_lock()? {
            // Whose it is cannot be said if the record cannot be read.
            dir.record()?;
            return Err(Error::new(format!(
                "container {id} is being created or deleted by somebody else"
            )));
        }
        let record = match dir.record() {
            Err(error) if self.force => {
                log::warn!(
                    "{error}; which cgroup it had, and what it made in a network namespace of \
                     others, is not known and stays"
                );
                None
            }
            record => record?,
        };
        event_loop()?.block_on(remove(&dir, record.as_ref()))?;
        Ok(0)
    }

    /// What is known of the container. With `--force`, what cannot be read is not known: its sandbox
    /// process is gone if its lock is free, and the VMM with it.
    fn record(&self, dir: &StateDir) -> Result<Option<Record>> {
        match dir.record() {
            Err(error) if self.force => {
                log::debug!("{error}");
                Ok(None)
            }
            record => record,
        }
    }

    /// Sees to it that the sandbox process ends, if it may.
    fn end(&self, dir: &StateDir, record: &Record) -> Result<()> {
        match record.current_status() {
            Status::Stopped => {}
            // As with runc: a container whose process was never started is killed without --force.
            Status::Created => {}
            status if !self.force => {
                return Err(Error::new(format!(
                    "cannot delete container {} that is not stopped: it is {status} (kill it \
                     first, or use --force)",
                    record.id
                )));
            }
            // Has nothing to lose, and no socket to be asked over.
            Status::Creating => {
                record.sandbox.kill(END_TIMEOUT);
            }
            Status::Running | Status::Paused => {}
        }
        if record.current_status() != Status::Stopped {
            // If it cannot be asked, it is killed when it does not end.
            if let Err(error) = ask(dir, &Request::Destroy) {
                log::debug!("{error}");
            }
        }
        if !record.sandbox.wait(END_TIMEOUT) {
            log::warn!("the sandbox process of {} does not end, so it is killed", record.id);
            record.sandbox.kill(END_TIMEOUT);
        }
        Ok(())
    }
}

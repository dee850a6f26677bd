//! `delete`: removes the remains of a container.

use std::time::Duration;

use clap::Args;

use crate::{
    cli::Global,
    container_id::ContainerId,
    control::{
        is_answered,
        remains::{remove, remove_unread},
    },
    engine::{Record, Remains, Request},
    error::{Error, Result},
    event_loop::event_loop,
    state::{StateDir, Status},
};

/// Longest time for a sandbox process to end its microVM in order. The sandbox process gives itself
/// less.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest time for a creation to be taken down.
const CREATION_END_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
pub(super) struct Delete {
    /// Kill the container if it still runs. A container that does not exist is no error then.
    #[arg(short, long)]
    force: bool,
    /// Id of the container.
    id: String,
}

impl Delete {
    pub(super) fn run(self, global: &Global) -> Result<u8> {
        let id = ContainerId::parse(&self.id)?;
        let dir = match StateDir::open(&global.root, &id) {
            Err(_) if self.force && !global.root.join(id.as_str()).exists() => return Ok(0),
            dir => dir?,
        };
        match Record::read(&dir) {
            Ok(Some(record)) => self.end(&dir, &record)?,
            Ok(None) => {}
            Err(error) => return self.delete_remains(&dir, error),
        }
        if !dir.try_lock()? {
            // The owner of the lock is unknown if the record cannot be read: the reason for that is
            // the error.
            Record::read(&dir)?;
            return Err(Error::new(format!(
                "container {id} is being created or deleted by somebody else"
            )));
        }
        let record = Record::read(&dir)?;
        event_loop()?.block_on(remove(&dir, record.as_ref()))?;
        Ok(0)
    }

    /// Deletes a container whose record cannot be read because of `error`. The container has to
    /// have ended, or `--force` is needed.
    fn delete_remains(&self, dir: &StateDir, error: Error) -> Result<u8> {
        let ended = Remains::read(dir).sandbox.is_some_and(|sandbox| !sandbox.is_alive());
        if !self.force && !ended {
            return Err(error);
        }
        remove_unread(dir, error, END_TIMEOUT).map(|()| 0)
    }

    /// Ends the sandbox process, if the container's status or `--force` permits it.
    fn end(&self, dir: &StateDir, record: &Record) -> Result<()> {
        if record.is_of_a_shim() && record.sandbox.is_alive() {
            return Err(Error::new(format!(
                "container {} is a task of containerd (its shim is process {}): delete it by a \
                 client of containerd",
                record.id, record.sandbox.pid
            )));
        }
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
            // Nothing can be lost yet, and there is no control socket for a request.
            Status::Creating => {
                // Asked first: so it ends its hooks, and their children with them.
                record.sandbox.let_go_on();
                record.sandbox.end(CREATION_END_TIMEOUT);
            }
            Status::Running | Status::Paused => {}
        }
        if record.current_status() != Status::Stopped {
            // A sandbox process that a signal has stopped would neither answer nor end.
            record.let_go_on();
            let why = match is_answered(dir, Request::Destroy) {
                Ok(true) => None,
                Ok(false) => Some("it does not answer".to_owned()),
                Err(error) => Some(error.message),
            };
            if let Some(why) = why {
                log::warn!("the sandbox process of {} is killed: {why}", record.id);
                record.sandbox.kill(END_TIMEOUT);
            }
        }
        if !record.sandbox.wait(END_TIMEOUT) {
            log::warn!("the sandbox process of {} does not end, so it is killed", record.id);
            record.sandbox.kill(END_TIMEOUT);
        }
        Ok(())
    }
}

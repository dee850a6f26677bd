//! `delete`: removes what is left of a container.

use std::time::Duration;

use clap::Args;

use super::{Global, creation::remove, run::event_loop};
use crate::{
    error::{Error, Result},
    sandbox::control::{Request, is_answered},
    state::{Id, Record, Remains, StateDir, Status},
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
        match dir.record() {
            Ok(Some(record)) => self.end(&dir, &record)?,
            Ok(None) => {}
            Err(error) => return self.delete_remains(&dir, error),
        }
        if !dir.try_lock()? {
            // Whose it is cannot be said if the record cannot be read.
            dir.record()?;
            return Err(Error::new(format!(
                "container {id} is being created or deleted by somebody else"
            )));
        }
        let record = dir.record()?;
        event_loop()?.block_on(remove(&dir, record.as_ref()))?;
        Ok(0)
    }

    /// Deletes a container whose record cannot be read because of `error`: with `--force`, or if it has
    /// ended. Its poststop hooks are not run, and its processes in a pod's microVM end with that.
    fn delete_remains(&self, dir: &StateDir, error: Error) -> Result<u8> {
        let Remains { sandbox, vmm, cgroup, network } = dir.remains();
        let ended = sandbox.is_some_and(|sandbox| !sandbox.is_alive());
        if !self.force && !ended {
            return Err(error);
        }
        for process in [sandbox, vmm].into_iter().flatten() {
            process.kill(END_TIMEOUT);
        }
        // Its sandbox process is gone if its lock is free, and the VMM with it.
        if !dir.try_lock()? {
            return Err(error);
        }
        match (&cgroup, &network) {
            (Some(_), _) | (_, Some(_)) => log::warn!("{error}"),
            (None, None) => log::warn!(
                "{error}; which cgroup it had, and what it made in a network namespace of \
                 others, is not known and stays"
            ),
        }
        let network = network.map_or(Ok(()), |taken| taken.give_back());
        let cgroup = cgroup.map_or(Ok(()), |cgroup| cgroup.remove());
        network.and(cgroup)?;
        dir.remove()?;
        Ok(0)
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
            // One that is stopped would neither answer nor end.
            record.sandbox.let_go_on();
            let why = match is_answered(dir, &Request::Destroy) {
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

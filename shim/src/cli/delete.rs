//! `delete`: removes the remains of a container.

use std::time::Duration;

use clap::Args;

use crate::{
    cli::{Global, create_options::remove},
    container_id::ContainerId,
    control::is_answered,
    engine::{Record, Remains, Request},
    error::{Error, Result},
    event_loop::event_loop,
    state::{StateDir, Status},
};

/// Longest time for a sandbox process to end its microVM in order. The sandbox process gives itself
/// less.
const END_TIMEOUT: Duration = Duration::from_secs(30);

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
    /// have ended, or `--force` is needed. Poststop hooks are not run. Processes in a pod's microVM
    /// end with that microVM.
    fn delete_remains(&self, dir: &StateDir, error: Error) -> Result<u8> {
        let Remains { sandbox, vmm, cgroup, network } = Remains::read(dir);
        let ended = sandbox.is_some_and(|sandbox| !sandbox.is_alive());
        if !self.force && !ended {
            return Err(error);
        }
        for process in [sandbox, vmm].into_iter().flatten() {
            process.kill(END_TIMEOUT);
        }
        // If the lock is free, the sandbox process is gone, and the VMM with it.
        if !dir.try_lock()? {
            return Err(error);
        }
        match (&cgroup, &network) {
            (Some(_), _) | (_, Some(_)) => log::warn!("{error}"),
            (None, None) => log::warn!(
                "{error}; its cgroup, and its redirects in a network namespace of others, are \
                 unknown and stay"
            ),
        }
        let network = network.map_or(Ok(()), |taken| taken.remove());
        let cgroup = cgroup.map_or(Ok(()), |cgroup| cgroup.remove());
        network.and(cgroup)?;
        dir.remove()?;
        Ok(0)
    }

    /// Ends the sandbox process, if the container's status or `--force` permits it.
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
            // Nothing can be lost yet, and there is no control socket for a request.
            Status::Creating => {
                record.sandbox.kill(END_TIMEOUT);
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

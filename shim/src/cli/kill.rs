//! `kill`: sends a signal.

use std::time::Duration;

use clap::Args;

use crate::{
    cli::Global,
    container_id::ContainerId,
    control::{Answer, ask, is_answered, remains::end_processes},
    engine::{Record, Remains, Request},
    error::{Error, Result},
    signal_names,
    signals::KILL,
    state::{Exit, StateDir, Status, versions},
};

/// Longest time for processes to end after SIGKILL.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
pub(super) struct Kill {
    /// Send the signal to every process of the container.
    #[arg(short, long)]
    all: bool,
    /// Id of the container.
    id: String,
    /// Name of the signal, with or without SIG, or its number.
    #[arg(default_value = "SIGTERM")]
    signal: String,
}

impl Kill {
    pub(super) fn run(self, global: &Global) -> Result<u8> {
        let id = ContainerId::parse(&self.id)?;
        let signal = signal_names::parse(&self.signal)?;
        let dir = StateDir::open(&global.root, &id)?;
        let record = match Record::read(&dir) {
            // A container of another version can be killed without a message to its sandbox
            // process.
            Err(error) if signal == KILL => return remains(&dir, error),
            record => record?,
        };
        let status = record.as_ref().map_or(Status::Creating, Record::current_status);
        // The wording is what containerd looks for.
        let not_running =
            || Err(Error::new(format!("cannot kill container {id}: container not running")));
        match status {
            // A paused container gets the signal when it is resumed, and SIGKILL at once.
            Status::Created | Status::Running | Status::Paused => {}
            // As with runc: no process is left, so all processes have been reached.
            Status::Stopped if self.all => return Ok(0),
            Status::Stopped | Status::Creating => return not_running(),
        }
        if let Some(record) = record.filter(|_| signal == KILL)
            && let Some(why) = unanswered(&dir, &record)
        {
            log::warn!("the sandbox process of container {id} is killed with its microVM: {why}");
            force(&dir, record)?;
            return Ok(0);
        }
        match ask(&dir, Request::Kill { signal, all: self.all })? {
            Answer::Done => Ok(0),
            Answer::Gone if self.all => Ok(0),
            Answer::Gone => not_running(),
        }
    }
}

/// Finds out why a sandbox process cannot answer; `None` if it can. A sandbox process that is
/// ending can.
fn unanswered(dir: &StateDir, record: &Record) -> Option<String> {
    if let Err(error) = versions::check(dir) {
        return Some(error.message);
    }
    record.let_go_on();
    let probe = Request::Kill { signal: 0, all: false };
    match is_answered(dir, probe) {
        Ok(false) => Some("it does not answer".into()),
        // A refusal is an answer.
        Ok(true) | Err(_) => None,
    }
}

/// Kills a container whose record cannot be read because of `error`.
fn remains(dir: &StateDir, error: Error) -> Result<u8> {
    let left = Remains::read(dir);
    let Some(sandbox) = left.sandbox.filter(|sandbox| sandbox.is_alive()) else {
        return Err(error);
    };
    log::warn!("{error}");
    let ended = [Some(sandbox), left.vmm].into_iter().flatten().all(|one| one.kill(KILL_TIMEOUT));
    if ended { Ok(0) } else { Err(error) }
}

/// Kills a container from outside, because its sandbox process does not answer, and records its
/// exit.
fn force(dir: &StateDir, record: Record) -> Result<()> {
    end_processes(&record)?;
    // A member's processes are in a microVM that goes on. The sandbox process of its pod ends them
    // as soon as it can.
    // Another process has the lock by now: it writes the record, or is about to remove it.
    if !dir.try_lock()? {
        return Ok(());
    }
    let exit = Some(Exit::KILLED);
    match Record::read(dir)? {
        Some(record) if record.exit.is_none() && record.error.is_none() => {
            (Record { status: Status::Stopped, exit, ..record }).write(dir)
        }
        _ => Ok(()),
    }
}

//! `kill`: sends a signal.

use std::time::Duration;

use clap::Args;

use super::{Global, creation::end_processes, run::event_loop};
use crate::{
    error::{Error, Result},
    sandbox::control::{Answer, Request, ask, is_answered},
    signal,
    state::{Exit, Id, Record, StateDir, Status},
};

/// `SIGKILL`.
const KILL: u32 = 9;

/// How long processes may take to end when they are killed.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the guest may take to end a container whose sandbox process had to be killed.
const GUEST_TIMEOUT: Duration = Duration::from_secs(3);

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
        let record = match dir.record() {
            // What another version has created can be killed without a word to it.
            Err(error) if signal == KILL => return remains(&dir, error),
            record => record?,
        };
        let status = record.as_ref().map_or(Status::Creating, Record::current_status);
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
        if let Some(record) = record.filter(|_| signal == KILL)
            && let Some(why) = unanswered(&dir, &record)
        {
            log::warn!("the sandbox process of container {id} is killed with its microVM: {why}");
            force(&dir, record)?;
            return Ok(0);
        }
        match ask(&dir, &Request::Kill { signal, all: self.all })? {
            Answer::Done => Ok(0),
            Answer::Gone if self.all => Ok(0),
            Answer::Gone => not_running(),
        }
    }
}

/// Why a sandbox process can be asked for nothing, if it cannot. One that is ending can.
fn unanswered(dir: &StateDir, record: &Record) -> Option<String> {
    if let Err(error) = dir.check_protocols() {
        return Some(error.message);
    }
    record.sandbox.let_go_on();
    let probe = Request::Kill { signal: 0, all: false };
    match is_answered(dir, &probe) {
        Ok(false) => Some("it does not answer".into()),
        // A refusal is an answer.
        Ok(true) | Err(_) => None,
    }
}

/// Kills a container whose record cannot be read because of `error`.
fn remains(dir: &StateDir, error: Error) -> Result<u8> {
    let left = dir.remains();
    let Some(sandbox) = left.sandbox.filter(|sandbox| sandbox.is_alive()) else {
        return Err(error);
    };
    log::warn!("{error}");
    let ended = [Some(sandbox), left.vmm].into_iter().flatten().all(|one| one.kill(KILL_TIMEOUT));
    if ended { Ok(0) } else { Err(error) }
}

/// Kills a container whose sandbox process does not answer, from outside, and writes down how it ended.
fn force(dir: &StateDir, record: Record) -> Result<()> {
    end_processes(&record)?;
    if let Some(pod) = &record.pod {
        // Its processes are in a microVM that goes on. If they do not end now, `delete` ends them.
        event_loop()?.block_on(async {
            let ended = tokio::time::timeout(GUEST_TIMEOUT, pod.clean_up(&record.id)).await;
            if let Ok(Err(error)) = ended {
                log::warn!("{error}");
            }
        });
    }
    // Who has the lock by now writes the record, or is about to remove it.
    if !dir.try_lock()? {
        return Ok(());
    }
    let exit = Some(Exit { status: 128 + 9, oom_killed: false });
    match dir.record()? {
        Some(record) if record.exit.is_none() && record.error.is_none() => {
            dir.write_record(&Record { status: Status::Stopped, exit, ..record })
        }
        _ => Ok(()),
    }
}

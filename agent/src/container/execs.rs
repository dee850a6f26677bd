//! The further processes of one container, by their ids.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::process::Process;
use crate::error::{Code, Error, Result};
use crate::log::log_warn;

/// Processes that have ended and can still be asked for their exit. The oldest go first.
const MAX_ENDED: usize = 256;

#[derive(Default)]
pub(crate) struct Execs {
    /// `None` while the process is being set up.
    processes: HashMap<String, Option<Arc<Process>>>,
    /// In the order of their start.
    order: Vec<String>,
    /// Those that somebody owns, from before their start on.
    held: HashSet<String>,
}

impl Execs {
    /// Notes that a process has an owner.
    ///
    /// # Errors
    ///
    /// It has one already.
    pub(crate) fn hold(&mut self, id: &str) -> Result<()> {
        if self.held.insert(id.to_owned()) {
            return Ok(());
        }
        Err(Error::state(format!("process {id:?} is owned by somebody else")))
    }

    /// Kills a process whose owner is gone. One that is being set up is killed by [`Self::put`].
    pub(crate) fn release(&mut self, id: &str) {
        self.held.remove(id);
        if let Some(Some(process)) = self.processes.get(id) {
            kill(process);
        }
    }

    /// Takes an id for a process that is about to be set up.
    ///
    /// # Errors
    ///
    /// A process that has not ended has it, or nobody owns it.
    pub(crate) fn reserve(&mut self, id: &str) -> Result<()> {
        if !self.held.contains(id) {
            return Err(Error::state(format!("process {id:?} has no owner")));
        }
        match self.processes.get(id) {
            None => {}
            Some(Some(process)) if process.has_ended() => self.order.retain(|known| known != id),
            Some(_) => return Err(Error::state(format!("process {id:?} exists already"))),
        }
        self.forget_ended();
        self.order.push(id.to_owned());
        self.processes.insert(id.to_owned(), None);
        Ok(())
    }

    /// Puts a process in the place that was reserved for it, and kills it if its owner is gone by now.
    pub(crate) fn put(&mut self, id: String, process: Arc<Process>) {
        if !self.held.contains(&id) {
            kill(&process);
        }
        self.processes.insert(id, Some(process));
    }

    /// Gives a reserved id back.
    pub(crate) fn forget(&mut self, id: &str) {
        self.processes.remove(id);
        self.order.retain(|known| known != id);
    }

    /// The process with this id.
    ///
    /// # Errors
    ///
    /// There is none, or it is being set up.
    pub(crate) fn get(&self, id: &str) -> Result<Arc<Process>> {
        match self.processes.get(id) {
            Some(Some(process)) => Ok(Arc::clone(process)),
            Some(None) => Err(Error::state(format!("process {id:?} is being started"))),
            None => Err(Error::new(Code::NotFound, format!("there is no process {id:?}"))),
        }
    }

    fn forget_ended(&mut self) {
        let ended =
            |process: &Option<Arc<Process>>| process.as_ref().is_some_and(|p| p.has_ended());
        let mut excess = self
            .processes
            .values()
            .filter(|process| ended(process))
            .count()
            .saturating_sub(MAX_ENDED - 1);
        let Self { processes, order, .. } = self;
        order.retain(|id| {
            let forget = excess > 0 && processes.get(id).is_some_and(ended);
            if forget {
                excess -= 1;
                processes.remove(id);
            }
            !forget
        });
    }
}

fn kill(process: &Process) {
    if !process.has_ended()
        && let Err(e) = process.signal(libc::SIGKILL.unsigned_abs())
    {
        // It has just ended, as a rule.
        log_warn!("a process whose owner is gone: {e}");
    }
}

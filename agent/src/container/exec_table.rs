//! The further processes of one container, by their ids.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::process::Process;
use crate::error::{Code, Error, Result};
use crate::log::log_warn;

/// Most ended processes whose exit can still be asked for. The oldest are dropped first.
const MAX_ENDED: usize = 256;

#[derive(Default)]
pub(crate) struct ExecTable {
    /// `None` while the process is being set up.
    processes: HashMap<String, Option<Arc<Process>>>,
    /// Ids in the order of their start.
    order: Vec<String>,
    /// Ids of the processes that have an owner. The ownership begins before the start.
    held: HashSet<String>,
}

impl ExecTable {
    /// Records an owner of a process. A second owner is an error.
    pub(crate) fn hold(&mut self, id: &str) -> Result<()> {
        if self.held.insert(id.to_owned()) {
            return Ok(());
        }
        Err(Error::state(format!("process {id:?} has an owner already")))
    }

    /// Kills a process whose owner is gone. [`Self::put`] kills a process that is still being set
    /// up.
    pub(crate) fn release(&mut self, id: &str) {
        self.held.remove(id);
        if let Some(Some(process)) = self.processes.get(id) {
            kill(process);
        }
    }

    /// Reserves the id of a process that is about to be set up. The process needs an owner, and no
    /// running process may have the id.
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

    /// Enters a process under its reserved id, and kills it if its owner has gone meanwhile.
    pub(crate) fn put(&mut self, id: String, process: Arc<Process>) {
        if !self.held.contains(&id) {
            kill(&process);
        }
        self.processes.insert(id, Some(process));
    }

    /// Releases a reserved id.
    pub(crate) fn forget(&mut self, id: &str) {
        self.processes.remove(id);
        self.order.retain(|known| known != id);
    }

    /// Returns the process with this id. A process that is still being set up is an error.
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
        // The process has just ended, as a rule.
        log_warn!("a process whose owner is gone: {e}");
    }
}

//! The further processes of one container, by their ids.
//!
//! ```text
//!            reserve                put           started            the process ends
//!  (nothing) -------> being set up -----> ready ----------> started ------------------> ended
//!                                   delete, in any state
//!  (nothing) <--------------------------------------------------------------------------
//! ```
//!
//! A deletion frees the id at once, also during the set-up. So the id alone does not tell whose
//! entry it is, and the set-up shows the number of its reservation.

use std::collections::HashMap;
use std::sync::Arc;

use super::process::Process;
use crate::error::{Code, Error, Result};
use crate::log::log_warn;

/// Most ended processes whose exit can still be asked for. The oldest are dropped first.
const MAX_ENDED: usize = 256;

#[derive(Default)]
pub(crate) struct ExecTable {
    entries: HashMap<String, Entry>,
    /// Number of the last reservation.
    last: u64,
}

struct Entry {
    /// Number of the reservation. Numbers ascend, and are never used again.
    number: u64,
    /// `None` until the process is ready to call `execve`.
    process: Option<Arc<Process>>,
    /// True once `execve` has succeeded.
    started: bool,
}

impl Entry {
    fn has_ended(&self) -> bool {
        self.started && self.process.as_ref().is_some_and(|process| process.has_ended())
    }
}

impl ExecTable {
    /// Reserves the id of a process that is about to be set up, and returns the number of the
    /// reservation. The id of a process that has not ended is an error.
    pub(crate) fn reserve(&mut self, id: &str) -> Result<u64> {
        if self.entries.get(id).is_some_and(|entry| !entry.has_ended()) {
            return Err(Error::state(format!("process {id:?} exists already")));
        }
        self.forget_ended();
        self.last += 1;
        let entry = Entry { number: self.last, process: None, started: false };
        self.entries.insert(id.to_owned(), entry);
        Ok(self.last)
    }

    /// Fails if the reservation has been deleted.
    pub(crate) fn check(&self, id: &str, number: u64) -> Result<()> {
        match self.entries.get(id) {
            Some(entry) if entry.number == number => Ok(()),
            _ => Err(deleted(id)),
        }
    }

    /// Enters a process that is ready. If the reservation has been deleted, the process is killed,
    /// and the call fails.
    pub(crate) fn put(&mut self, id: &str, number: u64, process: &Arc<Process>) -> Result<()> {
        let Some(entry) = self.reserved(id, number) else {
            if let Err(e) = kill(process) {
                log_warn!("a process that has been deleted: {e}");
            }
            return Err(deleted(id));
        };
        entry.process = Some(Arc::clone(process));
        Ok(())
    }

    /// Marks a process as started. A process that has been deleted is an error.
    pub(crate) fn started(&mut self, id: &str, number: u64) -> Result<()> {
        self.reserved(id, number).ok_or_else(|| deleted(id))?.started = true;
        Ok(())
    }

    /// Gives a reserved id back, unless its process has started.
    pub(crate) fn cancel(&mut self, id: &str, number: u64) {
        if self.reserved(id, number).is_some_and(|entry| !entry.started) {
            self.entries.remove(id);
        }
    }

    /// Kills a process, unless it has ended, and forgets it. [`Self::put`] kills a process that is
    /// still being set up. A missing process is no error.
    pub(crate) fn delete(&mut self, id: &str) -> Result<()> {
        if let Some(process) = self.entries.get(id).and_then(|entry| entry.process.as_ref()) {
            kill(process)?;
        }
        self.entries.remove(id);
        Ok(())
    }

    /// Returns the process with this id. A process that is still being started is an error.
    pub(crate) fn get(&self, id: &str) -> Result<Arc<Process>> {
        match self.entries.get(id) {
            Some(Entry { process: Some(process), started: true, .. }) => Ok(Arc::clone(process)),
            Some(_) => Err(Error::state(format!("process {id:?} is being started"))),
            None => Err(Error::new(Code::NotFound, format!("there is no process {id:?}"))),
        }
    }

    fn reserved(&mut self, id: &str, number: u64) -> Option<&mut Entry> {
        self.entries.get_mut(id).filter(|entry| entry.number == number)
    }

    fn forget_ended(&mut self) {
        let mut ended: Vec<u64> =
            self.entries.values().filter(|e| e.has_ended()).map(|e| e.number).collect();
        let Some(excess) = ended.len().checked_sub(MAX_ENDED) else { return };
        ended.sort_unstable();
        let last = ended[excess];
        self.entries.retain(|_, entry| entry.number > last || !entry.has_ended());
    }
}

fn deleted(id: &str) -> Error {
    Error::state(format!("process {id:?} has been deleted"))
}

fn kill(process: &Process) -> Result<()> {
    if process.has_ended() {
        return Ok(());
    }
    match process.signal(libc::SIGKILL.unsigned_abs()) {
        // The process has just ended.
        Err(e) if e.code == Code::FailedPrecondition => Ok(()),
        sent => sent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_in_use_is_refused_until_it_is_given_back() {
        let mut table = ExecTable::default();
        let number = table.reserve("a").unwrap();
        assert_eq!(table.reserve("a").unwrap_err().code, Code::FailedPrecondition);
        assert_eq!(table.get("a").err().unwrap().code, Code::FailedPrecondition);
        table.cancel("a", number);
        assert_eq!(table.get("a").err().unwrap().code, Code::NotFound);
        assert!(table.entries.is_empty());
    }

    #[test]
    fn a_deleted_set_up_does_not_touch_its_successor() {
        let mut table = ExecTable::default();
        let first = table.reserve("a").unwrap();
        table.delete("a").unwrap();
        let second = table.reserve("a").unwrap();
        assert!(table.check("a", first).is_err() && table.started("a", first).is_err());
        table.cancel("a", first);
        table.check("a", second).unwrap();
        table.delete("a").unwrap();
        table.delete("a").unwrap();
        assert!(table.entries.is_empty());
    }
}

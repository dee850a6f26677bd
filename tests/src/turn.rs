//! The turns of a test program's scopes: a scope that counts on the whole machine has no other
//! scope beside it.
//!
//! A turn is a lock for many or for one. Any thread may release it, not only its owner's.

use std::sync::{Condvar, Mutex, PoisonError};

static SCOPES: (Mutex<Scopes>, Condvar) =
    (Mutex::new(Scopes { alone: false, beside_others: 0 }), Condvar::new());

struct Scopes {
    alone: bool,
    beside_others: u32,
}

/// The right of a scope to exist, until the turn is dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    alone: bool,
}

impl Turn {
    /// Waits until no other scope exists.
    pub(crate) fn alone() -> Self {
        change(|scopes| scopes.alone || scopes.beside_others > 0, |scopes| scopes.alone = true);
        Self { alone: true }
    }

    /// Waits until no scope exists that has to be alone.
    pub(crate) fn beside_others() -> Self {
        change(|scopes| scopes.alone, |scopes| scopes.beside_others += 1);
        Self { alone: false }
    }

    /// Returns whether this scope has to be alone.
    pub(crate) fn is_alone(&self) -> bool {
        self.alone
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let end = |scopes: &mut Scopes| match self.alone {
            true => scopes.alone = false,
            false => scopes.beside_others -= 1,
        };
        change(|_| false, end);
        SCOPES.1.notify_all();
    }
}

/// Waits until nothing is in the way, then makes a change.
fn change(in_the_way: impl Fn(&Scopes) -> bool, make: impl FnOnce(&mut Scopes)) {
    let (scopes, changed) = &SCOPES;
    let scopes = scopes.lock().unwrap_or_else(PoisonError::into_inner);
    let scopes = changed.wait_while(scopes, |scopes| in_the_way(scopes));
    make(&mut scopes.unwrap_or_else(PoisonError::into_inner));
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    #[test]
    fn one_that_is_alone_waits_for_all_others_and_they_for_it() {
        let [first, second] = [Turn::beside_others(), Turn::beside_others()];
        let (said, heard) = channel();
        let alone = thread::spawn({
            let said = said.clone();
            move || {
                let turn = Turn::alone();
                said.send("alone").unwrap();
                turn
            }
        });
        drop(first);
        assert!(heard.try_recv().is_err());
        drop(second);
        assert_eq!(heard.recv(), Ok("alone"));
        let turn = alone.join().unwrap();
        let beside = thread::spawn(move || {
            let turn = Turn::beside_others();
            said.send("beside others").unwrap();
            turn
        });
        assert!(heard.try_recv().is_err());
        drop(turn);
        assert_eq!(heard.recv(), Ok("beside others"));
        drop(beside.join().unwrap());
    }
}

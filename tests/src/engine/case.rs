//! A case: what is to hold for a container of an engine, whatever its runtime.

use super::{Run, With};

/// What Isopod is expected to do with a case that runc passes.
#[derive(Debug, Clone, Copy)]
pub enum Expect {
    /// The same.
    Pass,
    /// Not that yet: to fail, and to say all of these words when it does. A case that passes after
    /// all fails its test, so that none stays listed.
    NotYet {
        /// What is missing.
        why: &'static str,
        /// What has to be said then, by the engine or the runtime.
        says: &'static [&'static str],
    },
}

/// One row of a test program's table.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Its name: the function's own.
    pub name: &'static str,
    pub(super) run: fn(&Run<'_>),
    pub(super) isopod: Expect,
    pub(super) with: &'static [With],
}

impl Case {
    /// A case for both runtimes. Made by [`crate::cases`].
    pub const fn new(name: &'static str, run: fn(&Run<'_>)) -> Self {
        Self { name, run, isopod: Expect::Pass, with: &[With::Runc, With::Isopod] }
    }

    /// Says that Isopod cannot pass it yet.
    #[must_use]
    pub const fn not_yet(self, why: &'static str, says: &'static [&'static str]) -> Self {
        Self { isopod: Expect::NotYet { why, says }, ..self }
    }

    /// For what only a microVM has.
    #[must_use]
    pub const fn isopod_only(self) -> Self {
        Self { with: &[With::Isopod], ..self }
    }
}

/// The row of a function: `case!(cases::exec::exec_takes_user)`.
#[macro_export]
macro_rules! case {
    ($($path:ident)::+) => {
        $crate::engine::Case::new($crate::engine::last_of(stringify!($($path)::+)), $($path)::+)
    };
}

//! A case: what is to hold for a container of an engine, whatever its runtime.

use super::{Run, With};

/// One row of a test program's table.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Its name: the function's own.
    pub name: &'static str,
    pub(super) run: fn(&Run<'_>),
    pub(super) with: &'static [With],
}

impl Case {
    /// A case for both runtimes. Made by [`crate::cases`].
    pub const fn new(name: &'static str, run: fn(&Run<'_>)) -> Self {
        Self { name, run, with: &[With::Runc, With::Isopod] }
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

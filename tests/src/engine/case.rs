//! A case: an expectation of an engine's container, whatever its runtime.

use super::{Run, With};

/// One row of a test program's table.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// The name of the case's function.
    pub name: &'static str,
    pub(super) run: fn(&Run<'_>),
    pub(super) with: &'static [With],
}

impl Case {
    /// A case for both runtimes. [`case!`](crate::case) makes it.
    pub const fn new(name: &'static str, run: fn(&Run<'_>)) -> Self {
        Self { name, run, with: &[With::Runc, With::Isopod] }
    }

    /// Limits the case to Isopod, for features that only a microVM has.
    #[must_use]
    pub const fn isopod_only(self) -> Self {
        Self { with: &[With::Isopod], ..self }
    }
}

/// The row of a function: `case!(cases::exec::exec)`.
#[macro_export]
macro_rules! case {
    ($($path:ident)::+) => {
        $crate::engine::Case::new($crate::engine::last_of(stringify!($($path)::+)), $($path)::+)
    };
}

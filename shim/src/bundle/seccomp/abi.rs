//! ABIs of system calls.

use libseccomp::ScmpArch;

/// An ABI by which system calls can be made in a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Abi {
    X8664,
    X86,
    X32,
}

impl Abi {
    pub(super) fn token(self) -> ScmpArch {
        match self {
            Self::X8664 => ScmpArch::X8664,
            Self::X86 => ScmpArch::X86,
            Self::X32 => ScmpArch::X32,
        }
    }
}

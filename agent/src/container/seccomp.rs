//! The system call filter of a container (`linux.seccomp` of config.json).
//!
//! The host compiles the filter and the agent only loads it, so the guest needs no libseccomp.

use std::io;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Bytes of a `struct sock_filter` (linux/filter.h).
const INSTRUCTION_LEN: usize = 8;

/// Most instructions that the kernel takes (`BPF_MAXINSNS`).
const MAX_INSTRUCTIONS: usize = 4096;

/// A filter and the flags to load it with.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SeccompFilter {
    flags: u32,
    /// Instructions, each the eight bytes of one `struct sock_filter`.
    instructions: Vec<u64>,
}

impl SeccompFilter {
    /// Takes the filter of a request, if there is one. Checks only its length; the kernel checks
    /// the rest when the filter is loaded.
    pub(crate) fn of(bytes: &[u8], flags: u32) -> Result<Option<Self>> {
        if bytes.is_empty() {
            return Ok(None);
        }
        let (chunks, rest) = bytes.as_chunks::<INSTRUCTION_LEN>();
        if !rest.is_empty() || chunks.len() > MAX_INSTRUCTIONS {
            let why = format!("the filter has {} bytes, which is not a valid length", bytes.len());
            return Err(Error::invalid("linux.seccomp", why));
        }
        let instructions = chunks.iter().copied().map(u64::from_ne_bytes).collect();
        Ok(Some(Self { flags, instructions }))
    }

    /// Installs the filter on the calling process, which has one thread, for good.
    ///
    /// The kernel answers `EACCES` without `CAP_SYS_ADMIN` or no_new_privs, and `EINVAL` for an
    /// invalid program.
    pub(crate) fn load(&self) -> io::Result<()> {
        let program = libc::sock_fprog {
            len: u16::try_from(self.instructions.len()).map_err(io::Error::other)?,
            filter: self.instructions.as_ptr().cast_mut().cast(),
        };
        // SAFETY: the program has `len` instructions of eight bytes. Their alignment exceeds the
        // required four. They live across the call; the kernel only reads them.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                self.flags,
                &raw const program,
            )
        };
        match result {
            0 => Ok(()),
            -1 => Err(io::Error::last_os_error()),
            thread => Err(io::Error::other(format!("thread {thread} has another filter"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_instructions_are_a_filter() {
        assert!(SeccompFilter::of(&[], 0).unwrap().is_none());
        assert_eq!(SeccompFilter::of(&[1; 16], 2).unwrap().unwrap().instructions.len(), 2);
        for length in [7, 9, 8 * (MAX_INSTRUCTIONS + 1)] {
            assert!(SeccompFilter::of(&vec![0; length], 0).is_err(), "{length}");
        }
    }
}

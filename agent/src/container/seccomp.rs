//! The system call filter of a container. The host has compiled it (`linux.seccomp` of config.json);
//! here it is only loaded, so that libseccomp is not part of the guest.

use std::io;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Bytes of a `struct sock_filter` (linux/filter.h).
const INSTRUCTION_LEN: usize = 8;

/// Most instructions that the kernel takes (`BPF_MAXINSNS`).
const MAX_INSTRUCTIONS: usize = 4096;

/// A filter and the flags to load it with.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Filter {
    flags: u32,
    /// Each the eight bytes of one `struct sock_filter`.
    instructions: Vec<u64>,
}

impl Filter {
    /// The filter in a request, if there is one.
    ///
    /// # Errors
    ///
    /// It cannot be one by its length. All else the kernel checks when it is loaded.
    pub(crate) fn of(bytes: &[u8], flags: u32) -> Result<Option<Self>> {
        if bytes.is_empty() {
            return Ok(None);
        }
        let (chunks, rest) = bytes.as_chunks::<INSTRUCTION_LEN>();
        if !rest.is_empty() || chunks.len() > MAX_INSTRUCTIONS {
            let why = format!("the filter has {} bytes, which none has", bytes.len());
            return Err(Error::invalid("linux.seccomp", why));
        }
        let instructions = chunks.iter().copied().map(u64::from_ne_bytes).collect();
        Ok(Some(Self { flags, instructions }))
    }

    /// Puts the filter on the calling process, which has one thread, for good.
    ///
    /// # Errors
    ///
    /// The kernel's: `EACCES` without `CAP_SYS_ADMIN` and no_new_privs, `EINVAL` for a program that
    /// is none.
    pub(crate) fn load(&self) -> io::Result<()> {
        let program = libc::sock_fprog {
            len: u16::try_from(self.instructions.len()).map_err(io::Error::other)?,
            filter: self.instructions.as_ptr().cast_mut().cast(),
        };
        // SAFETY: the program has `len` instructions of eight bytes, aligned to more than the four
        // that they need, and lives across the call; the kernel only reads it.
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
        assert!(Filter::of(&[], 0).unwrap().is_none());
        assert_eq!(Filter::of(&[1; 16], 2).unwrap().unwrap().instructions.len(), 2);
        for length in [7, 9, 8 * (MAX_INSTRUCTIONS + 1)] {
            assert!(Filter::of(&vec![0; length], 0).is_err(), "{length}");
        }
    }
}

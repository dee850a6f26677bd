//! Checks that a program file can be `/init` of a guest.
//!
//! The guest has no libraries. Without the check, a wrong build would show only as a kernel panic
//! at boot.

/// `e_type` of a program at a fixed address.
const ET_EXEC: u16 = 2;

/// `e_type` of a position-independent program.
const ET_DYN: u16 = 3;

/// `e_machine` of x86-64.
const EM_X86_64: u16 = 62;

/// `p_type` of the segment with the path of the dynamic linker.
const PT_INTERP: u32 = 3;

/// Reason that a program file cannot be `/init`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AgentError {
    /// No ELF header, or a header that points outside the file.
    #[error("it is not a whole ELF program")]
    NotElf,
    /// Program for another processor.
    #[error("it is not an x86-64 program")]
    Machine,
    /// Dynamically linked program: it needs libraries that the guest does not have.
    #[error("it is linked dynamically; build it with -C target-feature=+crt-static")]
    Dynamic,
}

/// Checks that `program` is a static x86-64 ELF program. Returns the first fault found.
pub fn check(program: &[u8]) -> Result<(), AgentError> {
    // ELF64, little endian, current version.
    if program.get(..7) != Some(b"\x7fELF\x02\x01\x01") {
        return Err(AgentError::NotElf);
    }
    if !matches!(u16_at(program, 16)?, ET_EXEC | ET_DYN) {
        return Err(AgentError::NotElf);
    }
    if u16_at(program, 18)? != EM_X86_64 {
        return Err(AgentError::Machine);
    }
    let table = usize::try_from(u64_at(program, 32)?).map_err(|_| AgentError::NotElf)?;
    let entry_len = usize::from(u16_at(program, 54)?);
    let entries = usize::from(u16_at(program, 56)?);
    if entries == 0 {
        return Err(AgentError::NotElf);
    }
    for index in 0..entries {
        let offset = index.checked_mul(entry_len).and_then(|at| at.checked_add(table));
        if u32_at(program, offset.ok_or(AgentError::NotElf)?)? == PT_INTERP {
            return Err(AgentError::Dynamic);
        }
    }
    Ok(())
}

fn bytes_at<const N: usize>(program: &[u8], offset: usize) -> Result<[u8; N], AgentError> {
    let rest = program.get(offset..).ok_or(AgentError::NotElf)?;
    rest.first_chunk().copied().ok_or(AgentError::NotElf)
}

fn u16_at(program: &[u8], offset: usize) -> Result<u16, AgentError> {
    bytes_at(program, offset).map(u16::from_le_bytes)
}

fn u32_at(program: &[u8], offset: usize) -> Result<u32, AgentError> {
    bytes_at(program, offset).map(u32::from_le_bytes)
}

fn u64_at(program: &[u8], offset: usize) -> Result<u64, AgentError> {
    bytes_at(program, offset).map(u64::from_le_bytes)
}

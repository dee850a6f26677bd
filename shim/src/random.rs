//! Random numbers of the kernel.

use crate::error::{Explain, Result};

/// Eight bytes of the kernel's random pool.
pub(crate) fn random_u64() -> Result<u64> {
    let mut bytes = [0; 8];
    fill(&mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}

/// Fills `bytes` from the kernel's random pool.
pub(crate) fn fill(bytes: &mut [u8]) -> Result<()> {
    let mut filled = 0;
    while filled < bytes.len() {
        filled +=
            rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())
                .explain(|| "cannot get random numbers from the kernel".into())?;
    }
    Ok(())
}

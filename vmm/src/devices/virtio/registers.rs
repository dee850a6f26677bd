//! The registers as guests read them: from memory, without an exit.
//!
//! Each device's window is a page of guest memory that guests cannot write. Every write of theirs is
//! an exit, in which the transport puts what they can read next into the page; so that whatever they
//! read is what the transport would have answered.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, MmapRegion, VolatileMemory as _};

/// The pages of all windows.
#[derive(Debug, Clone)]
pub struct RegisterPages(Arc<MmapRegion<()>>);

impl RegisterPages {
    /// `len` bytes of zeros.
    ///
    /// # Errors
    ///
    /// When the host gives no address space.
    pub fn new(len: usize) -> std::io::Result<Self> {
        Ok(Self(Arc::new(MmapRegion::new(len).map_err(std::io::Error::other)?)))
    }

    /// Address in this process, for KVM.
    pub fn host_addr(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    /// The window that begins at this offset.
    pub fn window(&self, start: usize) -> RegisterWindow {
        RegisterWindow { pages: self.clone(), start }
    }
}

/// One device's registers.
#[derive(Debug, Clone)]
pub struct RegisterWindow {
    pages: RegisterPages,
    start: usize,
}

impl RegisterWindow {
    /// Shows `value` at this offset. Beyond the end it is lost.
    pub(super) fn store(&self, offset: u64, value: u32) {
        let slice = self.pages.0.as_volatile_slice();
        // Release: a driver that sees a status sees what led to it.
        let _ = slice.store(value.to_le(), self.start + offset as usize, Ordering::Release);
    }

    /// What is shown.
    #[cfg(test)]
    pub(super) fn load(&self, offset: u64) -> u32 {
        let slice = self.pages.0.as_volatile_slice();
        u32::from_le(slice.load(self.start + offset as usize, Ordering::Acquire).unwrap())
    }
}

//! Pages with the registers' values, which guests read without an exit.
//!
//! Each device's window is a page of guest memory that guests cannot write. A guest's write is an
//! exit, in which the transport stores the next readable values in the page. So each read gets the
//! value that the transport would have returned.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, MmapRegion, VolatileMemory as _};

/// The pages of all windows.
#[derive(Debug, Clone)]
pub struct RegisterPages(Arc<MmapRegion<()>>);

impl RegisterPages {
    /// Maps `len` bytes of zeros.
    pub fn new(len: usize) -> std::io::Result<Self> {
        Ok(Self(Arc::new(MmapRegion::new(len).map_err(std::io::Error::other)?)))
    }

    /// Returns the address in this process, for KVM.
    pub fn host_addr(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    /// Returns the window at this offset.
    pub fn window(&self, start: usize) -> RegisterWindow {
        RegisterWindow { pages: self.clone(), start }
    }
}

/// The registers of one device.
#[derive(Debug, Clone)]
pub struct RegisterWindow {
    pages: RegisterPages,
    start: usize,
}

impl RegisterWindow {
    /// Stores `value` at this offset. A value beyond the end is lost.
    pub(super) fn store(&self, offset: u64, value: u32) {
        let slice = self.pages.0.as_volatile_slice();
        // Release: a driver that sees a status also sees the changes before it.
        let _ = slice.store(value.to_le(), self.start + offset as usize, Ordering::Release);
    }

    /// Returns the value at this offset.
    #[cfg(test)]
    pub(super) fn load(&self, offset: u64) -> u32 {
        let slice = self.pages.0.as_volatile_slice();
        u32::from_le(slice.load(self.start + offset as usize, Ordering::Acquire).unwrap())
    }
}

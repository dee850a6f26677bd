//! Decoding of requests. Each byte of guest memory is read once.

use std::ffi::CStr;
use std::io;

use fuse_backend_rs::abi::fuse_abi::InHeader;
use vm_memory::ByteValued;

use super::super::chain::Buffers;
use super::host::error;

/// Takes a structure from the front of the guest's buffers.
pub(super) fn take<T: ByteValued + Default>(buffers: &mut Buffers<'_>) -> io::Result<T> {
    let mut value = T::default();
    buffers.take_into(value.as_mut_slice()).ok_or_else(|| error(libc::EINVAL))?;
    Ok(value)
}

/// Takes the header, and cuts the buffers to the length that it gives. The result is `EINVAL`
/// if that length is more than there is, or less than a header.
pub(super) fn take_header(buffers: &mut Buffers<'_>) -> Option<(InHeader, io::Result<()>)> {
    let header: InHeader = take(buffers).ok()?;
    let said = (header.len as usize).checked_sub(size_of::<InHeader>());
    let fits = match said {
        Some(said) if said <= buffers.len() => {
            buffers.truncate(said);
            Ok(())
        }
        _ => Err(error(libc::EINVAL)),
    };
    Some((header, fits))
}

/// A request behind its header, copied to the VMM's memory.
pub(super) struct Body<'b>(&'b [u8]);

impl<'b> Body<'b> {
    pub(super) fn new(bytes: &'b [u8]) -> Self {
        Self(bytes)
    }

    /// Takes a structure from the front. `EINVAL` if less is left.
    pub(super) fn take<T: ByteValued + Default>(&mut self) -> io::Result<T> {
        let (front, rest) = self.0.split_at_checked(size_of::<T>()).ok_or_else(invalid)?;
        let mut value = T::default();
        value.as_mut_slice().copy_from_slice(front);
        self.0 = rest;
        Ok(value)
    }

    /// Takes a string from the front, up to its NUL. `EINVAL` without a NUL.
    pub(super) fn string(&mut self) -> io::Result<&'b CStr> {
        let string = CStr::from_bytes_until_nul(self.0).map_err(|_| invalid())?;
        self.0 = &self.0[string.count_bytes() + 1..];
        Ok(string)
    }

    /// Returns the rest.
    pub(super) fn rest(&self) -> &'b [u8] {
        self.0
    }
}

fn invalid() -> io::Error {
    error(libc::EINVAL)
}

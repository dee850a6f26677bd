//! A descriptor chain, mapped to buffers of this process.
//!
//! The guest controls everything in a chain: addresses, lengths, order and links. The iterator of
//! `virtio-queue` bounds the number of descriptors and the sum of their lengths. The code here
//! checks that each lies in guest memory, and that readable ones come before writable ones
//! (2.7.4.2).

use std::io;

use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory, VolatileSlice};

use crate::memory::GuestMemoryMap;

/// Error of a chain that breaks the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InvalidChain;

/// One request of the driver.
pub struct Chain<'m> {
    /// Index of the first descriptor, which names the chain when it is given back.
    pub head: u16,
    /// Data that the driver wrote for the device.
    pub readable: Buffers<'m>,
    /// Room for the device's answer.
    pub writable: Buffers<'m>,
}

impl<'m> Chain<'m> {
    /// Maps every descriptor.
    ///
    /// # Errors
    ///
    /// [`InvalidChain`] when a descriptor lies outside memory or out of order, or when there are
    /// more than `queue_size`. An indirect table must not have more either (2.7.5.3.1).
    pub fn new(
        memory: &'m GuestMemoryMap,
        descriptors: DescriptorChain<&GuestMemoryMap>,
        queue_size: u16,
    ) -> Result<Self, InvalidChain> {
        let head = descriptors.head_index();
        let mut chain = Self { head, readable: Buffers::default(), writable: Buffers::default() };
        walk(memory, descriptors, queue_size, |slice, writable| {
            if writable { &mut chain.writable } else { &mut chain.readable }.push(slice);
        })?;
        Ok(chain)
    }
}

/// Maps every descriptor and passes it to `each`, with true if the device may write it. After an
/// error the caller must not use the descriptors passed so far.
pub(super) fn walk<'m>(
    memory: &'m GuestMemoryMap,
    descriptors: DescriptorChain<&GuestMemoryMap>,
    queue_size: u16,
    mut each: impl FnMut(VolatileSlice<'m>, bool),
) -> Result<(), InvalidChain> {
    let mut seen_writable = false;
    for (count, descriptor) in descriptors.enumerate() {
        if count >= usize::from(queue_size) {
            return Err(InvalidChain);
        }
        // A descriptor may span two regions only where they touch. The regions of guest memory
        // never do.
        let slice = memory
            .get_slice(descriptor.addr(), descriptor.len() as usize)
            .map_err(|_| InvalidChain)?;
        let writable = descriptor.is_write_only();
        if seen_writable && !writable {
            return Err(InvalidChain);
        }
        seen_writable = writable;
        each(slice, writable);
    }
    Ok(())
}

/// Consecutive buffers, consumed from the front.
#[derive(Default)]
pub struct Buffers<'m> {
    slices: Vec<VolatileSlice<'m>>,
    len: usize,
}

impl<'m> Buffers<'m> {
    fn push(&mut self, slice: VolatileSlice<'m>) {
        self.len += slice.len();
        self.slices.push(slice);
    }

    /// Returns the number of bytes left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns true if no byte is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the buffers that are left.
    pub fn slices(&self) -> &[VolatileSlice<'m>] {
        &self.slices
    }

    /// Copies `N` bytes from the front. `None` if fewer are left.
    pub fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0u8; N];
        self.take_into(&mut bytes)?;
        Some(bytes)
    }

    /// Fills `bytes` from the front. If fewer are left, returns `None` and copies nothing.
    pub fn take_into(&mut self, bytes: &mut [u8]) -> Option<()> {
        let front = self.split_to(bytes.len())?;
        let mut at = 0;
        for slice in &front.slices {
            at += slice.copy_to(&mut bytes[at..]);
        }
        Some(())
    }

    /// Copies `bytes` to the front. If less room is left, returns `None` and copies nothing.
    pub fn put(&mut self, bytes: &[u8]) -> Option<()> {
        let front = self.split_to(bytes.len())?;
        let mut rest = bytes;
        for slice in &front.slices {
            slice.copy_from(rest);
            rest = &rest[slice.len().min(rest.len())..];
        }
        Some(())
    }

    /// Cuts off and returns the first `at` bytes. If fewer are left, returns `None` and cuts
    /// nothing.
    pub fn split_to(&mut self, at: usize) -> Option<Self> {
        if at > self.len {
            return None;
        }
        let mut front = Self::default();
        let mut whole = 0;
        for slice in &mut self.slices {
            let missing = at - front.len;
            if missing == 0 {
                break;
            }
            if slice.len() <= missing {
                front.push(*slice);
                whole += 1;
            } else {
                front.push(slice.subslice(0, missing).ok()?);
                *slice = slice.offset(missing).ok()?;
            }
        }
        self.slices.drain(..whole);
        self.len -= at;
        Some(front)
    }

    /// Keeps only the first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        if let Some(front) = self.split_to(len.min(self.len)) {
            *self = front;
        }
    }

    /// Copies all bytes that are left.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        let mut at = 0;
        for slice in &self.slices {
            at += slice.copy_to(&mut bytes[at..]);
        }
        bytes
    }

    /// Returns the iovecs for `readv` and similar calls: the first `max` bytes, in at most
    /// `IOV_MAX` buffers. The addresses are valid while the chain's memory is mapped.
    pub fn iovecs(&self, max: usize) -> Vec<libc::iovec> {
        let mut left = max;
        let mut iovecs = Vec::with_capacity(self.slices.len().min(IOV_MAX));
        for slice in self.slices.iter().take(IOV_MAX) {
            if left == 0 {
                break;
            }
            let iovec = iovec(slice, left);
            left -= iovec.iov_len;
            iovecs.push(iovec);
        }
        iovecs
    }
}

/// Most iovecs that `readv` and similar calls accept.
pub(super) const IOV_MAX: usize = 1024;

/// Returns an iovec of the first `max` bytes of a buffer. The address is valid while its memory is
/// mapped.
pub(super) fn iovec(slice: &VolatileSlice<'_>, max: usize) -> libc::iovec {
    let iov_base = slice.ptr_guard_mut().as_ptr().cast();
    libc::iovec { iov_base, iov_len: slice.len().min(max) }
}

/// Converts the return value of a system call to an `io::Result`.
pub(super) fn returned(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    fn lengths(iovecs: &[libc::iovec]) -> Vec<usize> {
        iovecs.iter().map(|iovec| iovec.iov_len).collect()
    }

    #[test]
    fn bytes_cross_buffers() {
        let memory = GuestMemoryMap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        memory.write_slice(b"abcdefgh", GuestAddress(0)).unwrap();
        let mut buffers = Buffers::default();
        for (at, len) in [(0, 3), (3, 0), (3, 5)] {
            buffers.push(memory.get_slice(GuestAddress(at), len).unwrap());
        }
        assert_eq!(lengths(&buffers.iovecs(usize::MAX)), [3, 0, 5]);
        assert_eq!(lengths(&buffers.iovecs(4)), [3, 0, 1]);
        assert_eq!(lengths(&buffers.iovecs(3)), [3]);
        assert!(buffers.split_to(9).is_none());
        assert_eq!(buffers.take::<2>(), Some(*b"ab"));
        assert_eq!(buffers.put(b"XY"), Some(()));
        assert_eq!(buffers.take::<3>(), Some(*b"efg"));
        assert_eq!((buffers.len(), buffers.take::<2>()), (1, None));
        assert_eq!(lengths(&buffers.iovecs(9)), [1]);
        let mut all = [0; 8];
        memory.read_slice(&mut all, GuestAddress(0)).unwrap();
        assert_eq!(&all, b"abXYefgh");
    }
}

//! The host socket of a stream, as both directions use it.

use std::io;

/// Error of a stream that broke a rule, or whose host end is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::devices::virtio::vsock) struct Broken;

/// Repeats a call while it is interrupted. `Ok(None)` if the call would block.
pub(super) fn uninterrupted(
    mut call: impl FnMut() -> io::Result<usize>,
) -> io::Result<Option<usize>> {
    loop {
        match call() {
            Ok(len) => return Ok(Some(len)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

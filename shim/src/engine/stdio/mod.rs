//! Standard streams: relayed between this process's descriptors and streams to the guest.
//!
//! Each stream is a connection of its own, with its own flow control and a thread with blocking
//! reads and writes. The descriptors are inherited and may be anything, files and terminals
//! included. Their file status flags are shared with other processes, so they cannot be made
//! non-blocking.

mod completion;
mod copy;
mod local;
mod loss_notice;
mod release;
mod streams;

pub(crate) use self::{
    completion::Relay,
    local::{Io, IoPlan, StandardStreams},
    release::{Release, release},
};

#[cfg(test)]
mod tests;

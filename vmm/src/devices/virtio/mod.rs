//! Virtio devices (OASIS virtio 1.2) and their MMIO transport.
//!
//! A new device implements the trait of `device.rs`; `vmm/src/builder.rs` makes it, with an
//! interrupt line of its own.

pub mod balloon;
pub mod block;
pub mod chain;
pub mod device;
pub mod fs;
pub mod interrupt;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod registers;
mod reserved_features;
pub mod rng;
pub mod slot;
pub mod state;
#[cfg(test)]
mod tests;
pub mod vsock;
pub mod worker;

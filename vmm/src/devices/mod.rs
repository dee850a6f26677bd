//! What the guest finds on its buses.

pub mod console;
pub mod reset;
pub mod virtio;

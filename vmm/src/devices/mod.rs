//! Devices on the guest's buses.

pub mod reset;
pub mod serial;
pub mod virtio;

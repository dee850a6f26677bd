//! The virtual machine monitor of Isopod: one process for one microVM.
//!
//! [`config`] is the configuration, and [`builder`] builds the microVM from it. [`vm`] and [`vcpu`]
//! run the microVM. [`devices`] has the guest's devices, and [`control`] the messages of the
//! sandbox process.

pub mod arch;
pub mod builder;
pub mod bus;
pub mod config;
pub mod control;
pub mod devices;
pub mod end;
pub mod event_loop;
pub mod image;
pub mod inherited;
pub mod jail;
pub mod memory;
mod sync;
pub mod text;
pub mod usage;
pub mod vcpu;
pub mod vm;

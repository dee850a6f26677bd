//! The virtual machine monitor of Isopod: one process, one microVM.
//!
//! [`config`] says what to run, [`builder`] puts it together, [`vm`] and [`vcpu`] run it,
//! [`devices`] are what the guest finds, [`control`] is how the sandbox process steers it.

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

//! The agent inside an Isopod guest: PID 1, which starts containers as the host asks it to.
//!
//! The guest's kernel starts the program as its first process. It mounts what everything needs
//! (`init`), listens on vsock (`server`), says hello to the host, and serves the calls of
//! agent.proto (`rpc`) with the runtime's one thread. Whatever blocks runs on other threads or in
//! the processes of the containers themselves, which begin as this same program (`container`).
//!
//! This is a library so that the tests can drive the same agent over unix sockets.

mod clock;
mod container;
mod demand;
mod error;
mod init;
mod log;
mod network;
mod oci;
mod pump;
mod reaper;
mod rpc;
mod sandbox;
mod server;
mod share;
mod shm;
mod stream;
mod syscall;

pub use container::init::{INIT_NAME, run_init};
pub use server::Listeners;

/// Runs as PID 1 of a guest. Returns only if the guest could not be set up, with why; the kernel
/// then panics and the host hears of it.
pub fn run_guest() -> String {
    let init_us = server::boot_time_us();
    std::panic::set_hook(Box::new(|panic| log::log_error!("{panic}")));
    let result = init::boot()
        .and_then(|()| server::Listeners::vsock())
        .and_then(|listeners| server::serve(listeners, || server::say_hello(init_us)));
    failed(result)
}

/// Does what [`run_guest`] does on other sockets, and calls `ready` in place of the greeting.
pub fn run_on(listeners: Listeners, ready: impl FnOnce()) -> String {
    failed(init::boot().and_then(|()| server::serve(listeners, ready)))
}

fn failed(result: error::Result<()>) -> String {
    let why = match result {
        Ok(()) => "the server has ended".to_owned(),
        Err(e) => e.message,
    };
    log::log_error!("{why}");
    why
}

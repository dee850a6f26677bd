//! The agent inside an Isopod guest: PID 1, which starts containers for the host.
//!
//! The guest's kernel starts the program as its first process. The agent mounts the file systems
//! (`init`), listens on vsock (`server`) and says hello to the host. Then the runtime's one thread
//! serves the calls of agent.proto (`rpc`).
//!
//! Blocking work runs on other threads, or in the containers' own processes, which begin as this
//! same program (`container`).
//!
//! The agent is a library so that the tests can drive it over unix sockets.

mod clock;
mod container;
mod demand;
mod disk;
mod error;
mod guest;
mod host_sockets;
mod init;
mod log;
mod network;
mod oci;
mod pump;
mod reaper;
mod rpc;
mod server;
mod share;
mod shm;
mod stream;
mod syscall;
mod volume;

pub use container::init::{INIT_NAME, run_init};
pub use server::Listeners;

/// Runs as PID 1 of a guest. Returns only if the guest could not be set up, with the reason. The
/// kernel then panics, which the host notices.
pub fn run_guest() -> String {
    let init_us = server::boot_time_us();
    std::panic::set_hook(Box::new(|panic| log::log_error!("{panic}")));
    let result = init::boot()
        .and_then(|()| server::Listeners::vsock())
        .and_then(|listeners| server::serve(listeners, || server::say_hello(init_us)));
    failed(result)
}

/// Runs like [`run_guest`] on other sockets, and calls `ready` in place of the greeting.
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

//! `isopod-agent`: `/init` of the guest's image, and the first program of each container.

// The standard library's start-up opens /dev/null for closed standard streams, and aborts without
// it. In a guest without a console the streams are closed, and this program is to mount /dev.
#![no_main]

use std::os::unix::ffi::OsStrExt as _;

/// Entry point for the C library, which has already passed the arguments to the standard library.
#[unsafe(no_mangle)]
extern "C" fn main() -> libc::c_int {
    if std::env::args_os()
        .next()
        .is_some_and(|name| name.as_bytes() == isopod_agent::INIT_NAME.to_bytes())
    {
        isopod_agent::run_init();
    }
    // SAFETY: takes no arguments and cannot fail.
    if unsafe { libc::getpid() } != 1 {
        eprintln!("isopod-agent is the init of an Isopod guest and runs only as PID 1");
        return 2;
    }
    // One heap for all threads: they allocate little, and each further heap costs memory.
    // SAFETY: no other thread exists yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    // SAFETY: writes to closed pipes and sockets become errors instead of ending PID 1.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    isopod_agent::run_guest();
    1
}

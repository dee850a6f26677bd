//! `isopod-vmm`: runs one microVM. Started by Isopod's sandbox process, not by people.

use std::convert::Infallible;
use std::fs::File;
use std::io::Read;
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::time::Duration;

use isopod_vmm::builder;
use isopod_vmm::config::VmConfig;
use isopod_vmm::control::{ControlSocket, EndReason, VmmEvent, VmmMessage};
use isopod_vmm::inherited::Inherited;
use isopod_vmm::{event_loop, jail};
use nix::time::ClockId;
use vmm_sys_util::eventfd::EventFd;

/// Longest configuration read, in bytes.
const MAX_CONFIG_LEN: u64 = 1 << 20;

const USAGE: &str = "usage: isopod-vmm --config-fd N | --version\n\
                     Runs the microVM whose configuration is read from descriptor N.";

fn main() -> ExitCode {
    let exec_us = now_us();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let message = match arguments[..] {
        ["--version"] => {
            println!("isopod-vmm {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        ["--config-fd", number] => match number.parse() {
            Ok(fd) if fd > 2 => match prepare(fd) {
                Ok((inherited, control)) => run(inherited, &control, exec_us),
                Err(message) => message,
            },
            _ => format!("--config-fd {number}: not a descriptor above 2"),
        },
        _ => USAGE.to_owned(),
    };
    eprintln!("isopod-vmm: {message}");
    ExitCode::FAILURE
}

/// Reads what to run. Until the control socket is there, failures go to standard error.
fn prepare(config_fd: i32) -> Result<(Inherited, ControlSocket), String> {
    let config = read_config(config_fd)?;
    jail::close_other_descriptors(&config.descriptors())
        .map_err(|e| format!("closing inherited descriptors: {e}"))?;
    // SAFETY: all descriptors above 2 were inherited, and this process has made none of its own that
    // is still open.
    let mut inherited = unsafe { Inherited::new(config) }.map_err(|e| e.to_string())?;
    let control = inherited.take_control().map_err(|e| e.to_string())?;
    Ok((inherited, ControlSocket::new(control)))
}

/// Runs the microVM to its end. Failures are told to the control socket.
fn run(inherited: Inherited, control: &ControlSocket, exec_us: u64) -> ! {
    match run_microvm(inherited, control, exec_us) {
        Ok(never) => match never {},
        Err(message) => finish(control, VmmEvent::Failed { message }),
    }
}

/// Tells why the microVM ended, and ends the process.
///
/// Nothing is torn down first. A vCPU or a worker may be held up for as long as it likes, by a host
/// file system or by whoever should read the console; the kernel ends them all, at once.
fn finish(control: &ControlSocket, last: VmmEvent) -> ! {
    let failed = matches!(last, VmmEvent::Failed { .. });
    // The sandbox process may be gone already.
    let _ = control.send(&VmmMessage::Event(last));
    std::process::exit(i32::from(failed))
}

fn read_config(fd: i32) -> Result<VmConfig, String> {
    // SAFETY: the descriptor was inherited for this purpose and is taken only here.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let mut json = Vec::new();
    file.take(MAX_CONFIG_LEN)
        .read_to_end(&mut json)
        .map_err(|e| format!("reading the configuration from descriptor {fd}: {e}"))?;
    VmConfig::from_json(&json).map_err(|e| e.to_string())
}

fn run_microvm(
    inherited: Inherited,
    control: &ControlSocket,
    exec_us: u64,
) -> Result<Infallible, String> {
    let event = |e: std::io::Error| format!("making an event descriptor: {e}");
    let reset = EventFd::new(libc::EFD_NONBLOCK).map_err(event)?;
    let reset_port = reset.try_clone().map_err(event)?;
    let mut vm = builder::build(inherited, reset_port).map_err(|e| e.to_string())?;
    let started = VmmEvent::Started { exec_us, running_us: now_us() };
    control.send(&VmmMessage::Event(started)).map_err(|e| format!("control socket: {e}"))?;
    vm.vcpus.let_run();
    // Not an early return: the vCPUs run, and dropping them waits for each.
    let reason = event_loop::run(&mut vm, control, &reset).unwrap_or_else(|e| {
        EndReason::VmmFailed { message: format!("waiting for events: epoll: {e}") }
    });
    finish(control, event_loop::ended(&vm, reason))
}

/// `CLOCK_MONOTONIC` in microseconds.
fn now_us() -> u64 {
    let time = ClockId::CLOCK_MONOTONIC.now().map_or(Duration::ZERO, Duration::from);
    time.as_micros() as u64
}

//! `isopod-vmm`: runs one microVM. Isopod's sandbox process starts it, not a person.

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

/// Longest configuration in bytes.
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

/// Reads the configuration and takes its descriptors. Errors go to standard error, because there is
/// no control socket yet.
fn prepare(config_fd: i32) -> Result<(Inherited, ControlSocket), String> {
    let config = read_config(config_fd)?;
    jail::close_other_descriptors(&config.descriptors())
        .map_err(|e| format!("cannot close inherited descriptors: {e}"))?;
    // SAFETY: all descriptors above 2 were inherited. This process has opened none that is still
    // open.
    let mut inherited = unsafe { Inherited::new(config) }.map_err(|e| e.to_string())?;
    let control = inherited.take_control().map_err(|e| e.to_string())?;
    Ok((inherited, ControlSocket::new(control)))
}

/// Runs the microVM to its end. Errors go to the control socket.
fn run(inherited: Inherited, control: &ControlSocket, exec_us: u64) -> ! {
    match run_microvm(inherited, control, exec_us) {
        Ok(never) => match never {},
        Err(message) => finish(control, VmmEvent::Failed { message }),
    }
}

/// Sends the last message, and ends the process.
///
/// Nothing is torn down first. A host file system or a reader of the console may hold up a vCPU or
/// a worker for any time. The kernel ends all threads at once.
fn finish(control: &ControlSocket, last: VmmEvent) -> ! {
    let failed = matches!(last, VmmEvent::Failed { .. });
    // The call fails if the sandbox process is gone.
    let _ = control.send(&VmmMessage::Event(last));
    std::process::exit(i32::from(failed))
}

fn read_config(fd: i32) -> Result<VmConfig, String> {
    // SAFETY: the descriptor was inherited for the configuration, and is taken only here.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let mut json = Vec::new();
    file.take(MAX_CONFIG_LEN)
        .read_to_end(&mut json)
        .map_err(|e| format!("cannot read the configuration from descriptor {fd}: {e}"))?;
    VmConfig::from_json(&json).map_err(|e| e.to_string())
}

fn run_microvm(
    inherited: Inherited,
    control: &ControlSocket,
    exec_us: u64,
) -> Result<Infallible, String> {
    let event = |e: std::io::Error| format!("cannot make an event descriptor: {e}");
    let reset = EventFd::new(libc::EFD_NONBLOCK).map_err(event)?;
    let reset_port = reset.try_clone().map_err(event)?;
    let mut vm = builder::build(inherited, reset_port).map_err(|e| e.to_string())?;
    let started = VmmEvent::Started { exec_us, running_us: now_us() };
    control
        .send(&VmmMessage::Event(started))
        .map_err(|e| format!("cannot write to the control socket: {e}"))?;
    vm.vcpus.resume();
    // An early return would drop the vCPUs, which run, and wait for each.
    let reason = event_loop::run(&mut vm, control, &reset).unwrap_or_else(|e| {
        EndReason::VmmFailed { message: format!("cannot wait for events: epoll: {e}") }
    });
    finish(control, event_loop::ended(&vm, reason))
}

/// Returns `CLOCK_MONOTONIC` in microseconds.
fn now_us() -> u64 {
    let time = ClockId::CLOCK_MONOTONIC.now().map_or(Duration::ZERO, Duration::from);
    time.as_micros() as u64
}

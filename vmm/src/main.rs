//! `isopod-vmm`: runs one microVM. Started by Isopod's sandbox process, not by people.

use std::fs::File;
use std::io::Read;
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::time::Duration;

use isopod_vmm::builder;
use isopod_vmm::config::VmConfig;
use isopod_vmm::control::{ControlSocket, VmmEvent, VmmMessage};
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
    let outcome = match arguments[..] {
        ["--version"] => {
            println!("isopod-vmm {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        ["--config-fd", number] => match number.parse() {
            Ok(fd) if fd > 2 => run(fd, exec_us),
            _ => Err(format!("--config-fd {number}: not a descriptor above 2")),
        },
        _ => Err(USAGE.to_owned()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("isopod-vmm: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the microVM to its end. Failures after the control socket is there are told to it.
fn run(config_fd: i32, exec_us: u64) -> Result<(), String> {
    let config = read_config(config_fd)?;
    jail::close_other_descriptors(&config.descriptors())
        .map_err(|e| format!("closing inherited descriptors: {e}"))?;
    // SAFETY: the descriptor was inherited for this process, is named once in the validated
    // configuration, and is taken only here.
    let control = ControlSocket::new(unsafe { OwnedFd::from_raw_fd(config.control_fd) });
    let last = match run_microvm(&config, &control, exec_us) {
        Ok(event) => event,
        Err(message) => VmmEvent::Failed { message },
    };
    let failed = matches!(last, VmmEvent::Failed { .. });
    // The sandbox process may be gone already.
    let _ = control.send(&VmmMessage::Event(last));
    if failed {
        std::process::exit(1)
    }
    Ok(())
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
    config: &VmConfig,
    control: &ControlSocket,
    exec_us: u64,
) -> Result<VmmEvent, String> {
    let event = |e: std::io::Error| format!("event descriptors: {e}");
    let reset = EventFd::new(libc::EFD_NONBLOCK).map_err(event)?;
    let reset_port = reset.try_clone().map_err(event)?;
    let mut vm = builder::build(config, reset_port).map_err(|e| e.to_string())?;
    let started = VmmEvent::Started { exec_us, running_us: now_us() };
    control.send(&VmmMessage::Event(started)).map_err(|e| format!("control socket: {e}"))?;
    vm.vcpus.let_run();
    let reason = event_loop::run(&mut vm, control, &reset).map_err(event)?;
    Ok(event_loop::ended(&vm, reason))
}

/// `CLOCK_MONOTONIC` in microseconds.
fn now_us() -> u64 {
    let time = ClockId::CLOCK_MONOTONIC.now().map_or(Duration::ZERO, Duration::from);
    time.as_micros() as u64
}

//! The main thread. It waits for the sandbox process, the guest's reset, and the end.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::builder::Microvm;
use crate::control::{ControlSocket, EndReason, VmmAction, VmmEvent, VmmMessage, VmmReply};
use crate::devices::virtio::block::Block;

const CONTROL: u64 = 0;
const RESET: u64 = 1;
const END: u64 = 2;
const FILES: u64 = 3;

/// Longest wait for the vCPUs to pause. A reader of the console or a host file system may hold up a
/// vCPU in a device. The main thread must still receive a stop.
const PAUSE_LIMIT: Duration = Duration::from_secs(5);

/// Serves `vm` until it ends. Returns the reason.
///
/// # Errors
///
/// When epoll fails.
pub fn run(vm: &mut Microvm, control: &ControlSocket, reset: &EventFd) -> io::Result<EndReason> {
    let epoll = Epoll::new()?;
    for (fd, token) in [
        (control.as_raw_fd(), CONTROL),
        (reset.as_raw_fd(), RESET),
        (vm.end.event().as_raw_fd(), END),
    ] {
        epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token))?;
    }
    if let Some(share) = &vm.share {
        let fd = share.high_water().as_raw_fd();
        epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, FILES))?;
    }
    let mut events = [EpollEvent::default(); 4];
    loop {
        let count = match epoll.wait(-1, &mut events) {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        // An end that has happened takes precedence over requests.
        if events[..count].iter().any(|e| e.data() == END)
            && let Some(reason) = vm.end.reason()
        {
            return Ok(reason);
        }
        for event in &events[..count] {
            match event.data() {
                RESET => return Ok(EndReason::GuestShutdown),
                CONTROL => {
                    if let Some(reason) = serve(vm, control) {
                        return Ok(reason);
                    }
                }
                FILES => {
                    // Read first, so that a later notice is sent again.
                    let _ = vm.share.as_ref().map(|share| share.high_water().read());
                    if control.send(&VmmMessage::Event(VmmEvent::FilesHigh)).is_err() {
                        return Ok(EndReason::Stopped);
                    }
                }
                _ => {}
            }
        }
    }
}

/// Makes the last message. A guest that panics resets itself like a guest that shuts down, and only
/// its console shows the difference.
pub fn ended(vm: &Microvm, reason: EndReason) -> VmmEvent {
    let (console_tail, panicked) = vm.console.snapshot();
    let reason = match reason {
        EndReason::GuestShutdown | EndReason::TripleFault if panicked => EndReason::GuestPanic,
        other => other,
    };
    VmmEvent::Ended { reason, console_tail }
}

/// Executes an action of the sandbox process. Returns a reason to end.
fn serve(vm: &mut Microvm, control: &ControlSocket) -> Option<EndReason> {
    let reply = match control.receive() {
        Ok(Some((VmmAction::Stop, _))) | Ok(None) => return Some(EndReason::Stopped),
        Ok(Some((VmmAction::Pause, _))) => {
            if vm.vcpus.pause(PAUSE_LIMIT) {
                VmmReply::Done
            } else {
                let limit = PAUSE_LIMIT.as_secs();
                VmmReply::Failed { message: format!("a vCPU did not stop within {limit} seconds") }
            }
        }
        Ok(Some((VmmAction::Resume, _))) => {
            vm.vcpus.resume();
            VmmReply::Done
        }
        Ok(Some((VmmAction::Status, _))) => status(vm),
        Ok(Some((VmmAction::AttachDisk { slot, path, read_only }, file))) => {
            match attach_disk(vm, slot, &path, read_only, file) {
                Ok(number) => VmmReply::Attached { number },
                Err(message) => VmmReply::Failed { message },
            }
        }
        Ok(Some((VmmAction::DetachDisk { slot }, _))) => match vm.vm.unplug(slot) {
            Ok(()) => VmmReply::Done,
            Err(e) => VmmReply::Failed { message: e.to_string() },
        },
        Err(e) => {
            let message = format!("cannot read the control socket: {e}");
            return Some(EndReason::VmmFailed { message });
        }
    };
    match control.send(&VmmMessage::Reply(reply)) {
        Ok(()) => None,
        Err(_) => Some(EndReason::Stopped),
    }
}

/// Puts a disk into a slot. Returns the number of its device in the guest.
fn attach_disk(
    vm: &Microvm,
    slot: u8,
    path: &str,
    read_only: bool,
    file: Option<File>,
) -> Result<u32, String> {
    let file = file.ok_or_else(|| format!("{path}: its descriptor did not come"))?;
    let disk = Block::new(file, "", read_only).map_err(|e| format!("{path}: {e}"))?;
    vm.vm.plug(slot, Box::new(disk)).map_err(|e| format!("{path}: {e}"))
}

fn status(vm: &mut Microvm) -> VmmReply {
    let mut exits = BTreeMap::new();
    vm.vcpus.add_exits(&mut exits);
    vm.stats.iter().for_each(|stats| stats.add_to(&mut exits));
    match vm.memory_meter.read() {
        Ok(resident) => VmmReply::Status {
            paused: vm.vcpus.is_paused(),
            exits,
            overhead_kib: resident.overhead_kib,
            guest_resident_kib: resident.guest_kib,
            fs_requests: vm.share.as_ref().map(|s| s.requests().read()).unwrap_or_default(),
            stream_bytes_to_guest: vm.stream_bytes.to_guest.load(Ordering::Relaxed),
            stream_bytes_to_host: vm.stream_bytes.to_host.load(Ordering::Relaxed),
        },
        Err(e) => VmmReply::Failed { message: format!("cannot read /proc/self/smaps: {e}") },
    }
}

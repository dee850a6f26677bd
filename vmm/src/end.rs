//! The end of the machine, and its reason.

use std::io;
use std::sync::Mutex;

use vmm_sys_util::eventfd::EventFd;

use crate::control::EndReason;
use crate::sync::lock;

/// Signal of the machine's end. vCPUs and workers give it, and the main thread waits for it.
pub struct EndSignal {
    event: EventFd,
    reason: Mutex<Option<EndReason>>,
}

impl EndSignal {
    /// Creates a signal that is not given.
    pub fn new() -> io::Result<Self> {
        Ok(Self { event: EventFd::new(libc::EFD_NONBLOCK)?, reason: Mutex::default() })
    }

    /// Returns an eventfd that becomes readable with the signal.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Gives the signal. The first reason stays.
    pub fn give(&self, reason: EndReason) {
        lock(&self.reason).get_or_insert(reason);
        // A full counter is readable as well.
        let _ = self.event.write(1);
    }

    /// Gives the signal with [`EndReason::VmmFailed`], for a part of the VMM that cannot go on.
    pub fn fail(&self, message: String) {
        self.give(EndReason::VmmFailed { message });
    }

    /// Returns the reason, once the signal is given.
    pub fn reason(&self) -> Option<EndReason> {
        lock(&self.reason).clone()
    }
}

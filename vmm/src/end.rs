//! Why the machine ends, told once by whoever finds out first.

use std::io;
use std::sync::Mutex;

use vmm_sys_util::eventfd::EventFd;

use crate::control::EndReason;
use crate::sync::lock;

/// The end of the machine. vCPUs and workers give it, the main thread waits for it.
pub struct EndSignal {
    event: EventFd,
    reason: Mutex<Option<EndReason>>,
}

impl EndSignal {
    /// A signal not yet given.
    ///
    /// # Errors
    ///
    /// When the host gives no descriptor.
    pub fn new() -> io::Result<Self> {
        Ok(Self { event: EventFd::new(libc::EFD_NONBLOCK)?, reason: Mutex::default() })
    }

    /// Becomes readable with the signal.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Gives the signal; the first reason stays.
    pub fn give(&self, reason: EndReason) {
        lock(&self.reason).get_or_insert(reason);
        // A full counter is readable as well.
        let _ = self.event.write(1);
    }

    /// A part of the VMM cannot go on: gives the signal with [`EndReason::VmmFailed`].
    pub fn fail(&self, message: String) {
        self.give(EndReason::VmmFailed { message });
    }

    /// The reason, once given.
    pub fn reason(&self) -> Option<EndReason> {
        lock(&self.reason).clone()
    }
}

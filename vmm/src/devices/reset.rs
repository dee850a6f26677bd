//! The reset line of the keyboard controller, by which the guest resets itself.

use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// Pulses the reset line of the i8042 (`kernel/reboot.c`, `reboot=k`).
const COMMAND_RESET: u8 = 0xfe;

/// Command port of the i8042, for its reset command only.
pub struct ResetPort {
    requested: EventFd,
}

impl ResetPort {
    /// Creates a port that signals `requested` when the guest resets itself.
    pub fn new(requested: EventFd) -> Self {
        Self { requested }
    }
}

impl BusDevice for ResetPort {
    // The status register: both buffers are empty, so the guest need not wait before its command.
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if data == [COMMAND_RESET] {
            // A full counter is as good a signal as a new one.
            let _ = self.requested.write(1);
        }
    }
}

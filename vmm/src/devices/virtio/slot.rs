//! A place for a device that comes while the microVM runs.
//!
//! An empty place shows device id 0, which drivers ignore (virtio 1.2, 4.2.2). virtio-mmio announces
//! no device. So the guest's agent has the driver look again.

use vmm_sys_util::eventfd::EventFd;

use super::mmio::{self, MmioTransport};
use super::registers::RegisterWindow;
use crate::bus::BusDevice;

/// A register window with a device, or without one.
pub struct Slot {
    window: RegisterWindow,
    plugged: Option<Plugged>,
}

/// A device in a slot.
pub struct Plugged {
    /// The device behind its transport.
    pub transport: MmioTransport,
    /// The event of its interrupt line.
    pub line: EventFd,
}

impl Slot {
    /// Creates an empty slot that shows its registers in `window`.
    pub fn new(window: RegisterWindow) -> Self {
        let slot = Self { window, plugged: None };
        slot.show_empty();
        slot
    }

    /// Shows the registers of a slot without a device.
    pub fn show_empty(&self) {
        mmio::show_no_device(&self.window);
    }

    /// Returns true if the slot has a device.
    pub fn is_in_use(&self) -> bool {
        self.plugged.is_some()
    }

    /// Puts in a device, whose transport shows its registers in the slot's window.
    pub fn plug(&mut self, plugged: Plugged) {
        self.plugged = Some(plugged);
    }

    /// Resets the device and takes it out. `None` without a device, and if the reset takes longer
    /// than a vCPU would wait for it. Then the device stays.
    pub fn unplug(&mut self) -> Option<Plugged> {
        if !self.plugged.as_mut()?.transport.stop() {
            return None;
        }
        let plugged = self.plugged.take();
        self.show_empty();
        plugged
    }
}

impl BusDevice for Slot {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match &mut self.plugged {
            Some(plugged) => plugged.transport.read(offset, data),
            None => mmio::read_no_device(offset, data),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(plugged) = &mut self.plugged {
            plugged.transport.write(offset, data);
        }
    }
}

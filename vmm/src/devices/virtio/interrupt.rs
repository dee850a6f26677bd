//! The interrupt line of a virtio device.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// The interrupt line of one device.
///
/// The line is raised for used rings only, and belongs to this device alone. So `InterruptStatus`
/// can report a used ring for as long as the device is in service. No interrupt has to be counted
/// or acknowledged, and the host's kernel can raise the line too.
#[derive(Clone)]
pub struct Interrupt(Arc<EventFd>);

impl Interrupt {
    /// Creates a line that is raised through `line`, an irqfd.
    pub fn new(line: EventFd) -> Self {
        Self(Arc::new(line))
    }

    pub(super) fn line(&self) -> &EventFd {
        &self.0
    }

    pub(super) fn trigger(&self) {
        // The write fails only on a full counter, and then the interrupt is pending already.
        let _ = self.0.write(1);
    }
}

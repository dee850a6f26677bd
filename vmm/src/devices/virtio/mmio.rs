//! The MMIO transport (virtio 1.2, 4.2), version 2 without legacy.
//!
//! ```text
//!            ACKNOWLEDGE, DRIVER            FEATURES_OK            DRIVER_OK
//!   reset ------------------------> negotiating --------> setting up queues --------> active
//!     ^                                                                                 |
//!     +------------------------------- write 0 to Status ------------------------------+
//! ```
//!
//! A reset waits for the device's workers, and a host file system may hold up a worker for any
//! time. So a separate thread waits, and the vCPU waits no longer than [`RESET_LIMIT`]. After that,
//! Status reports that the reset is not complete (2.4.2), and writes have no effect.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Activation, VirtioDevice, read_from};
use super::interrupt::Interrupt;
use super::queue::{ActiveQueue, rings_are_in_memory};
use super::registers::RegisterWindow;
use super::reserved_features::{FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, FEATURE_VERSION_1};
use super::state::{DeviceState, QueueState};
use crate::bus::BusDevice;
use crate::end::EndSignal;
use crate::memory::GuestMemoryMap;
use crate::sync::lock;

/// Longest time that a vCPU waits for the reset of a device.
const RESET_LIMIT: Duration = Duration::from_secs(1);

/// "virt"
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
const VENDOR: u32 = 0;

const STATUS_ACKNOWLEDGE: u32 = 1;
const STATUS_DRIVER: u32 = 2;
const STATUS_DRIVER_OK: u32 = 4;
const STATUS_FEATURES_OK: u32 = 8;
const STATUS_NEEDS_RESET: u32 = 64;
const STATUS_FAILED: u32 = 128;

/// Bit of `InterruptStatus` for a used ring that may have changed (4.2.2).
const INTERRUPT_USED_RING: u32 = 1;

/// Register offsets (4.2.2).
mod register {
    pub(super) const MAGIC: u64 = 0x00;
    pub(super) const VERSION: u64 = 0x04;
    pub(super) const DEVICE_ID: u64 = 0x08;
    pub(super) const VENDOR_ID: u64 = 0x0c;
    pub(super) const DEVICE_FEATURES: u64 = 0x10;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub(super) const DRIVER_FEATURES: u64 = 0x20;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub(super) const QUEUE_SEL: u64 = 0x30;
    pub(super) const QUEUE_NUM_MAX: u64 = 0x34;
    pub(super) const QUEUE_NUM: u64 = 0x38;
    pub(super) const QUEUE_READY: u64 = 0x44;
    pub(super) const QUEUE_NOTIFY: u64 = 0x50;
    pub(super) const INTERRUPT_STATUS: u64 = 0x60;
    pub(super) const INTERRUPT_ACK: u64 = 0x64;
    pub(super) const STATUS: u64 = 0x70;
    pub(super) const QUEUE_DESC_LOW: u64 = 0x80;
    pub(super) const QUEUE_DESC_HIGH: u64 = 0x84;
    pub(super) const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub(super) const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub(super) const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub(super) const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub(super) const SHM_LEN_LOW: u64 = 0xb0;
    pub(super) const SHM_LEN_HIGH: u64 = 0xb4;
    pub(super) const SHM_BASE_LOW: u64 = 0xb8;
    pub(super) const SHM_BASE_HIGH: u64 = 0xbc;
    pub(super) const CONFIG_GENERATION: u64 = 0xfc;
    pub(super) const CONFIG: u64 = 0x100;

    /// The readable registers. All others read as zero.
    pub(super) const READABLE: [u64; 14] = [
        MAGIC,
        VERSION,
        DEVICE_ID,
        VENDOR_ID,
        DEVICE_FEATURES,
        QUEUE_NUM_MAX,
        QUEUE_READY,
        INTERRUPT_STATUS,
        STATUS,
        SHM_LEN_LOW,
        SHM_LEN_HIGH,
        SHM_BASE_LOW,
        SHM_BASE_HIGH,
        CONFIG_GENERATION,
    ];
}

/// Offset of the register that ioeventfds watch for kicks.
pub const QUEUE_NOTIFY: u64 = register::QUEUE_NOTIFY;

/// Offset of the register that the driver writes after each interrupt, without effect.
pub const INTERRUPT_ACK: u64 = register::INTERRUPT_ACK;

/// Bytes of the configuration space in the window. No device here has more.
const CONFIG_LEN: u64 = 64;

/// Registers of the transport, apart from those of the queues.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
}

/// State of a device and its transport.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioState {
    /// Registers of the transport.
    pub transport: TransportState,
    /// The queues, as their registers show them.
    pub queues: Vec<QueueState>,
    /// The device, if it is in service and has a state.
    pub device: Option<DeviceState>,
}

/// A virtio device on the memory bus.
pub struct MmioTransport {
    /// `None` during a reset.
    device: Option<Box<dyn VirtioDevice>>,
    /// The device during a reset.
    resetting: Arc<Resetting>,
    about: About,
    memory: GuestMemoryMap,
    state: TransportState,
    queues: Vec<Queue>,
    kicks: Vec<EventFd>,
    interrupt: Interrupt,
    window: RegisterWindow,
    end: Arc<EndSignal>,
}

/// Constant properties of a device.
struct About {
    device_type: u32,
    features: u64,
    queue_sizes: Vec<u16>,
    /// True for each queue that has a worker.
    workers: Vec<bool>,
    config: [u8; CONFIG_LEN as usize],
}

impl About {
    fn new(device: &dyn VirtioDevice) -> Self {
        let queue_sizes = device.queue_sizes().to_vec();
        let workers = (0..queue_sizes.len()).map(|index| device.has_worker(index)).collect();
        let mut config = [0; CONFIG_LEN as usize];
        device.read_config(0, &mut config);
        let features = device.features();
        Self { device_type: device.device_type(), features, queue_sizes, workers, config }
    }
}

/// A device during its reset.
#[derive(Default)]
struct Resetting {
    /// The device after its reset.
    device: Mutex<Option<Box<dyn VirtioDevice>>>,
    done: Condvar,
}

impl MmioTransport {
    /// Puts `device` behind a transport.
    ///
    /// The transport raises `interrupt`, and shows its registers in `window`. A device that cannot
    /// go on gives `end`.
    ///
    /// # Errors
    ///
    /// When no eventfd can be made for a queue's kicks.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemoryMap,
        interrupt: Interrupt,
        window: RegisterWindow,
        end: Arc<EndSignal>,
    ) -> std::io::Result<Self> {
        let about = About::new(device.as_ref());
        let kicks = about
            .queue_sizes
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<std::io::Result<_>>()?;
        let queues = new_queues(&about.queue_sizes);
        let state = TransportState::default();
        let (device, resetting) = (Some(device), Arc::default());
        let transport =
            Self { device, resetting, about, memory, state, queues, kicks, interrupt, window, end };
        transport.show();
        transport.show_config();
        Ok(transport)
    }

    /// Writes the readable registers into the window.
    fn show(&self) {
        for offset in register::READABLE {
            // During a reset another thread writes the status.
            if offset != register::STATUS || self.device.is_some() {
                self.window.store(offset, self.read_register(offset));
            }
        }
    }

    /// Writes the configuration space into the window. No device here changes it later.
    fn show_config(&self) {
        for (offset, bytes) in (0..).step_by(4).zip(self.about.config.as_chunks().0) {
            self.window.store(register::CONFIG + offset, u32::from_le_bytes(*bytes));
        }
    }

    /// Returns the state of device and transport. The workers are held meanwhile, and the vCPUs
    /// must be paused.
    ///
    /// # Errors
    ///
    /// When the workers cannot continue for want of a thread, or during a reset.
    pub fn state(&mut self) -> std::io::Result<MmioState> {
        let busy = || std::io::Error::from(std::io::ErrorKind::ResourceBusy);
        let device = self.device.as_mut().ok_or_else(busy)?;
        device.hold();
        let state = MmioState {
            transport: self.state,
            queues: self.queues.iter().map(|queue| QueueState::of(queue, false)).collect(),
            device: device.state(),
        };
        device.resume()?;
        Ok(state)
    }

    /// Returns the eventfds of the queues that have a worker, with the queue's index.
    pub fn worker_kicks(&self) -> impl Iterator<Item = (u32, &EventFd)> {
        self.kicks
            .iter()
            .enumerate()
            .filter(|(index, _)| self.about.workers[*index])
            .map(|(index, kick)| (index as u32, kick))
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.about.device_type,
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => match self.state.device_features_sel {
                0 => self.offered() as u32,
                1 => (self.offered() >> 32) as u32,
                _ => 0,
            },
            register::QUEUE_NUM_MAX => self.selected().map_or(0, |q| q.max_size().into()),
            register::QUEUE_READY => self.selected().map_or(0, |q| q.ready().into()),
            register::INTERRUPT_STATUS => self.interrupt_status(),
            register::STATUS => self.state.status,
            // No shared memory regions: a missing region has the length of all ones.
            register::SHM_LEN_LOW
            | register::SHM_LEN_HIGH
            | register::SHM_BASE_LOW
            | register::SHM_BASE_HIGH => u32::MAX,
            register::CONFIG_GENERATION => 0,
            _ => 0,
        }
    }

    fn interrupt_status(&self) -> u32 {
        if self.state.status & STATUS_DRIVER_OK != 0 { INTERRUPT_USED_RING } else { 0 }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SEL => self.state.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.state.driver_features_sel = value,
            register::DRIVER_FEATURES => self.set_driver_features(value),
            register::QUEUE_SEL => self.state.queue_sel = value,
            register::QUEUE_NOTIFY => self.notify(value),
            register::STATUS => self.set_status(value),
            _ => self.write_queue_register(offset, value),
        }
    }

    fn write_queue_register(&mut self, offset: u64, value: u32) {
        // The driver may change queues only between FEATURES_OK and DRIVER_OK (3.1.1).
        if self.state.status & (STATUS_FEATURES_OK | STATUS_DRIVER_OK) != STATUS_FEATURES_OK {
            return;
        }
        let Some(queue) = self.queues.get_mut(self.state.queue_sel as usize) else { return };
        match offset {
            register::QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
            register::QUEUE_READY => queue.set_ready(value == 1),
            register::QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            register::QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            register::QUEUE_DRIVER_LOW => queue.set_avail_ring_address(Some(value), None),
            register::QUEUE_DRIVER_HIGH => queue.set_avail_ring_address(None, Some(value)),
            register::QUEUE_DEVICE_LOW => queue.set_used_ring_address(Some(value), None),
            register::QUEUE_DEVICE_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn offered(&self) -> u64 {
        self.about.features | FEATURE_VERSION_1 | FEATURE_EVENT_IDX | FEATURE_INDIRECT_DESC
    }

    fn selected(&self) -> Option<&Queue> {
        self.queues.get(self.state.queue_sel as usize)
    }

    fn set_driver_features(&mut self, value: u32) {
        if self.state.status & STATUS_FEATURES_OK != 0 {
            return;
        }
        let (shift, kept) = match self.state.driver_features_sel {
            0 => (0, 0xffff_ffff_0000_0000),
            1 => (32, 0x0000_0000_ffff_ffff),
            _ => return,
        };
        self.state.driver_features =
            (self.state.driver_features & kept) | (u64::from(value) << shift);
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let added = value & !self.state.status;
        let known = STATUS_ACKNOWLEDGE
            | STATUS_DRIVER
            | STATUS_FEATURES_OK
            | STATUS_DRIVER_OK
            | STATUS_FAILED;
        let mut status = self.state.status | (value & known);
        if added & STATUS_FEATURES_OK != 0 && !self.features_are_acceptable() {
            status &= !STATUS_FEATURES_OK;
        }
        // DRIVER_OK counts once, and only after FEATURES_OK.
        if added & STATUS_DRIVER_OK != 0 {
            status &= !STATUS_DRIVER_OK;
            if status & STATUS_FEATURES_OK != 0 && status & STATUS_NEEDS_RESET == 0 {
                status |= if self.activate() { STATUS_DRIVER_OK } else { STATUS_NEEDS_RESET };
            }
        }
        self.state.status = status;
    }

    fn features_are_acceptable(&self) -> bool {
        let accepted = self.state.driver_features;
        accepted & !self.offered() == 0
            && accepted & FEATURE_VERSION_1 != 0
            && self.device.as_ref().is_some_and(|device| device.accepts(accepted))
    }

    fn activate(&mut self) -> bool {
        let event_idx = self.state.driver_features & FEATURE_EVENT_IDX != 0;
        let mut active = Vec::with_capacity(self.queues.len());
        for (queue, kick) in self.queues.iter_mut().zip(&self.kicks) {
            queue.set_event_idx(event_idx);
            let Ok(kick) = kick.try_clone() else { return false };
            // A driver may leave out a queue whose feature it does not use.
            if queue.ready() && !rings_are_in_memory(queue, &self.memory) {
                return false;
            }
            // The device owns the queue from now on. The copy here keeps the registers readable.
            let Ok(mut theirs) = Queue::new(queue.max_size()) else { return false };
            std::mem::swap(&mut theirs, queue);
            queue.set_size(theirs.size());
            queue.set_ready(theirs.ready());
            active.push(ActiveQueue::new(theirs, kick, self.interrupt.clone()));
        }
        let activation = Activation {
            memory: self.memory.clone(),
            features: self.state.driver_features,
            queues: active,
            end: Arc::clone(&self.end),
        };
        self.device.as_mut().is_some_and(|device| device.activate(activation).is_ok())
    }

    fn reset(&mut self) {
        let in_service = self.state.status & (STATUS_DRIVER_OK | STATUS_NEEDS_RESET) != 0;
        self.state = TransportState::default();
        self.queues = new_queues(&self.about.queue_sizes);
        if in_service {
            self.reset_device();
        }
        for kick in &self.kicks {
            // Kicks of the queues before the reset have no meaning now. A read without a kick
            // fails.
            let _ = kick.read();
        }
    }

    /// Resets the device, as a driver does that gives it up. False if the reset is not complete
    /// after [`RESET_LIMIT`].
    pub(super) fn stop(&mut self) -> bool {
        if self.is_here() {
            self.reset();
            self.show();
        }
        self.is_here()
    }

    /// Starts the reset of the device, and waits for at most [`RESET_LIMIT`].
    fn reset_device(&mut self) {
        let Some(mut device) = self.device.take() else { return };
        let (resetting, window) = (Arc::clone(&self.resetting), self.window.clone());
        let thread = thread::Builder::new().name("reset".to_owned()).spawn(move || {
            device.reset();
            let mut slot = lock(&resetting.device);
            *slot = Some(device);
            // After the device is back in its slot, because the driver may begin at once.
            window.store(register::STATUS, 0);
            resetting.done.notify_all();
        });
        if let Err(e) = thread {
            // The closure was dropped with the device in it, which has reset the device.
            return self.end.fail(format!("a device cannot be reset: cannot start a thread: {e}"));
        }
        let slot = lock(&self.resetting.device);
        let waited =
            self.resetting.done.wait_timeout_while(slot, RESET_LIMIT, |slot| slot.is_none());
        let (mut slot, _) = waited.unwrap_or_else(PoisonError::into_inner);
        self.device = slot.take();
        if self.device.is_none() {
            self.state.status = STATUS_NEEDS_RESET;
            // Under the lock, so that this does not overwrite the zero of the other thread.
            self.window.store(register::STATUS, STATUS_NEEDS_RESET);
        }
    }

    /// Returns true if the device is not being reset. Takes it back after a reset.
    fn is_here(&mut self) -> bool {
        if self.device.is_none() {
            self.device = lock(&self.resetting.device).take();
            if self.device.is_some() {
                self.state.status = 0;
            }
        }
        self.device.is_some()
    }

    fn notify(&mut self, index: u32) {
        let index = index as usize;
        if self.state.status & STATUS_DRIVER_OK == 0 || index >= self.kicks.len() {
            return;
        }
        if self.about.workers[index] {
            // Reached only if KVM does not handle the write by an ioeventfd.
            let _ = self.kicks[index].write(1);
        } else if let Some(device) = &mut self.device {
            device.notify(index);
        }
    }
}

/// Shows a window without a device: its id is 0.
pub(super) fn show_no_device(window: &RegisterWindow) {
    for offset in register::READABLE {
        window.store(offset, no_device_register(offset));
    }
    for offset in (register::CONFIG..register::CONFIG + CONFIG_LEN).step_by(4) {
        window.store(offset, 0);
    }
}

/// Fills `data`, which is zero, from the registers of a window without a device.
pub(super) fn read_no_device(offset: u64, data: &mut [u8]) {
    if data.len() == 4 {
        data.copy_from_slice(&no_device_register(offset).to_le_bytes());
    }
}

fn no_device_register(offset: u64) -> u32 {
    match offset {
        register::MAGIC => MAGIC,
        register::VERSION => VERSION,
        _ => 0,
    }
}

fn new_queues(sizes: &[u16]) -> Vec<Queue> {
    // The crate requires a power of two up to 32768, as all queue sizes here are.
    sizes.iter().filter_map(|size| Queue::new(*size).ok()).collect()
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if offset >= register::CONFIG {
            read_from(&self.about.config, offset - register::CONFIG, data);
        } else if data.len() == 4 {
            self.is_here();
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // The only writable configuration field is the balloon's `actual` (5.5.4), the size of the
        // balloon, which the VMM does not use.
        if let Ok(value) = <[u8; 4]>::try_from(data)
            && offset < register::CONFIG
            && self.is_here()
        {
            self.write_register(offset, u32::from_le_bytes(value));
            if offset != register::QUEUE_NOTIFY && offset != register::INTERRUPT_ACK {
                self.show();
            }
        }
    }
}

//! A driver for any device behind the transport.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::BusDevice;
use crate::devices::virtio::device::VirtioDevice;
use crate::devices::virtio::interrupt::Interrupt;
use crate::devices::virtio::mmio::MmioTransport;
use crate::devices::virtio::registers::{RegisterPages, RegisterWindow};
use crate::devices::virtio::worker::borrow;
use crate::end::EndSignal;
use crate::memory::GuestMemoryMap;

/// Time limit above the duration of every step on the slowest machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

pub(super) const MEMORY_LEN: usize = 64 << 20;

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

pub(super) const EVENT_IDX: u64 = 1 << 29;
pub(super) const VERSION_1: u64 = 1 << 32;

/// A buffer of a chain: address, length, and true if the device writes it.
pub(super) type Buffer = (u64, u32, bool);

pub(super) fn memory() -> GuestMemoryMap {
    GuestMemoryMap::from_ranges(&[(GuestAddress(0), MEMORY_LEN)]).unwrap()
}

pub(super) struct Driver {
    pub(super) transport: MmioTransport,
    /// The registers as the guest reads them without an exit.
    pub(super) shown: RegisterWindow,
    pub(super) memory: GuestMemoryMap,
    pub(super) queues: Vec<Ring>,
    pub(super) end: Arc<EndSignal>,
    line: EventFd,
    kicks: HashMap<u32, EventFd>,
    /// Features that the driver does not accept.
    pub(super) declined: u64,
}

impl Driver {
    /// Finds a device, in the state after a reset.
    pub(super) fn found(device: Box<dyn VirtioDevice>) -> Self {
        let memory = memory();
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Interrupt::new(line.try_clone().unwrap());
        let end = Arc::new(EndSignal::new().unwrap());
        let window = RegisterPages::new(0x2000).unwrap().window(0x1000);
        let (ram, shown) = (memory.clone(), window.clone());
        let transport =
            MmioTransport::new(device, ram, interrupt, window, Arc::clone(&end)).unwrap();
        let kicks =
            transport.worker_kicks().map(|(n, kick)| (n, kick.try_clone().unwrap())).collect();
        Self { transport, shown, memory, queues: Vec::new(), end, line, kicks, declined: 0 }
    }

    /// Takes a device into service.
    pub(super) fn started(device: Box<dyn VirtioDevice>) -> Self {
        let mut driver = Self::found(device);
        driver.start();
        driver
    }

    /// Takes a device into service without event indices, so that the rings' flags are used.
    pub(super) fn started_with_flags(device: Box<dyn VirtioDevice>) -> Self {
        Self::started_without(device, EVENT_IDX)
    }

    /// Takes a device into service without these features.
    pub(super) fn started_without(device: Box<dyn VirtioDevice>, declined: u64) -> Self {
        let mut driver = Self::found(device);
        driver.declined = declined;
        driver.start();
        driver
    }

    /// Returns the features that the device offers.
    pub(super) fn offered(&mut self) -> u64 {
        let mut half = |select| {
            self.write(0x14, select);
            u64::from(self.read(0x10))
        };
        half(0) | half(1) << 32
    }

    pub(super) fn read(&mut self, register: u64) -> u32 {
        let mut bytes = [0; 4];
        self.transport.read(register, &mut bytes);
        let value = u32::from_le_bytes(bytes);
        assert_eq!(self.shown.load(register), value, "register {register:#x}");
        value
    }

    pub(super) fn write(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    pub(super) fn config<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut bytes = [0xff; N];
        self.transport.read(0x100 + offset, &mut bytes);
        for (at, byte) in (0x100 + offset..).zip(bytes) {
            assert_eq!(self.shown.load(at & !3).to_le_bytes()[at as usize & 3], byte);
        }
        bytes
    }

    pub(super) fn status(&mut self) -> u32 {
        self.read(0x70)
    }

    pub(super) fn negotiate(&mut self) {
        self.write(0x70, 1);
        self.write(0x70, 3);
        let accepted = self.offered() & !self.declined;
        for (select, features) in [(0, accepted), (1, accepted >> 32)] {
            self.write(0x24, select);
            self.write(0x20, features as u32);
        }
        self.write(0x70, 11);
        assert_eq!(self.status(), 11);
    }

    pub(super) fn set_up_queue(&mut self, index: u32, desc: u64, avail: u64, used: u64) -> u16 {
        self.write(0x30, index);
        let size = self.read(0x34);
        assert_eq!(self.read(0x44), 0, "a queue that is ready before it is set up");
        self.write(0x38, size);
        for (register, address) in [(0x80, desc), (0x90, avail), (0xa0, used)] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(0x44, 1);
        assert_eq!(self.read(0x44), 1);
        size as u16
    }

    pub(super) fn start(&mut self) {
        self.negotiate();
        self.set_up_queues();
        self.write(0x70, 15);
        assert_eq!(self.status(), 15);
    }

    pub(super) fn set_up_queues(&mut self) {
        self.queues.clear();
        for index in 0.. {
            self.write(0x30, index);
            if self.read(0x34) == 0 {
                break;
            }
            let base = 0x1_0000 * u64::from(index + 1);
            self.memory.write_slice(&vec![0; 0x1_0000], GuestAddress(base)).unwrap();
            let size = self.set_up_queue(index, base, base + 0x4000, base + 0x8000);
            self.queues.push(Ring::new(base, size));
        }
    }

    pub(super) fn reset(&mut self) {
        self.write(0x70, 0);
        assert_eq!(self.status(), 0);
    }

    /// Makes a chain available, and kicks if the device wants kicks. Returns the chain's head.
    pub(super) fn offer(&mut self, queue: usize, buffers: &[Buffer]) -> u16 {
        let head = self.queues[queue].add(&self.memory, buffers);
        self.kick(queue);
        head
    }

    /// Kicks as Linux does: only if the device wants kicks.
    pub(super) fn kick(&mut self, queue: usize) {
        let event_idx = self.declined & EVENT_IDX == 0;
        if self.queues[queue].wants_kick(&self.memory, event_idx) {
            self.kick_always(queue);
        }
    }

    pub(super) fn kick_always(&mut self, queue: usize) {
        match self.kicks.get(&(queue as u32)) {
            Some(kick) => kick.write(1).unwrap(),
            None => self.write(0x50, queue as u32),
        }
    }

    /// Takes the next used chain, if there is one: its head, and the bytes written.
    pub(super) fn used(&mut self, queue: usize) -> Option<(u16, u32)> {
        self.queues[queue].take_used(&self.memory)
    }

    /// Takes the next used chain, and waits for the device's interrupt.
    pub(super) fn wait_used(&mut self, queue: usize) -> (u16, u32) {
        loop {
            if let Some(used) = self.used(queue) {
                return used;
            }
            self.wait_interrupt();
        }
    }

    pub(super) fn wait_interrupt(&mut self) {
        let mut fds = [PollFd::new(borrow(&self.line), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(PATIENCE).unwrap();
        assert_ne!(poll(&mut fds, timeout).unwrap(), 0, "no interrupt came");
        let _ = self.line.read();
        let status = self.read(0x60);
        self.write(0x64, status);
    }

    /// Sends one chain and waits until it is used. Returns the bytes written.
    pub(super) fn request(&mut self, queue: usize, buffers: &[Buffer]) -> u32 {
        let head = self.offer(queue, buffers);
        let (used, len) = self.wait_used(queue);
        assert_eq!(used, head);
        len
    }

    pub(super) fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(super) fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

/// The driver's side of a split queue (virtio 1.2, 2.7): descriptors, and the rings at fixed
/// offsets behind them.
pub(super) struct Ring {
    base: u64,
    size: u16,
    next_descriptor: u16,
    pub(super) available: u16,
    kicked: u16,
    used: u16,
}

impl Ring {
    fn new(base: u64, size: u16) -> Self {
        Self { base, size, next_descriptor: 0, available: 0, kicked: 0, used: 0 }
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    pub(super) fn descriptor(
        &self,
        memory: &GuestMemoryMap,
        index: u16,
        (address, len, flags, next): (u64, u32, u16, u16),
    ) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        let at = GuestAddress(self.base + 16 * u64::from(index));
        memory.write_slice(&bytes, at).unwrap();
    }

    /// Lays out a chain in the next descriptors. Those of chains long used are overwritten.
    pub(super) fn add(&mut self, memory: &GuestMemoryMap, buffers: &[Buffer]) -> u16 {
        let at = |n: usize| (usize::from(self.next_descriptor) + n) % usize::from(self.size);
        let head = at(0) as u16;
        for (n, (address, len, writable)) in buffers.iter().enumerate() {
            let next = if n + 1 < buffers.len() { NEXT } else { 0 };
            let flags = next | if *writable { WRITE } else { 0 };
            self.descriptor(memory, at(n) as u16, (*address, *len, flags, at(n + 1) as u16));
        }
        self.next_descriptor = at(buffers.len()) as u16;
        self.make_available(memory, head);
        head
    }

    pub(super) fn make_available(&mut self, memory: &GuestMemoryMap, head: u16) {
        let slot = self.base + 0x4004 + 2 * u64::from(self.available % self.size);
        memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_available(memory, self.available.wrapping_add(1));
    }

    pub(super) fn set_available(&mut self, memory: &GuestMemoryMap, index: u16) {
        self.available = index;
        let ordering = std::sync::atomic::Ordering::SeqCst;
        memory.store(index, GuestAddress(self.base + 0x4002), ordering).unwrap();
    }

    fn wants_kick(&mut self, memory: &GuestMemoryMap, event_idx: bool) -> bool {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let (old, new) = (self.kicked, self.available);
        self.kicked = new;
        if event_idx {
            let at = self.base + 0x8004 + 8 * u64::from(self.size);
            let event: u16 = memory.read_obj(GuestAddress(at)).unwrap();
            return new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old);
        }
        memory.read_obj::<u16>(GuestAddress(self.base + 0x8000)).unwrap() & 1 == 0
    }

    fn take_used(&mut self, memory: &GuestMemoryMap) -> Option<(u16, u32)> {
        // Asks for an interrupt for the next chain, then reads the index.
        let used_event = self.base + 0x4004 + 2 * u64::from(self.size);
        memory.write_obj(self.used, GuestAddress(used_event)).unwrap();
        let ordering = std::sync::atomic::Ordering::SeqCst;
        std::sync::atomic::fence(ordering);
        let index: u16 = memory.load(GuestAddress(self.base + 0x8002), ordering).unwrap();
        if index == self.used {
            return None;
        }
        let slot = self.base + 0x8004 + 8 * u64::from(self.used % self.size);
        let [head, len]: [u32; 2] = memory.read_obj(GuestAddress(slot)).unwrap();
        self.used = self.used.wrapping_add(1);
        Some((head as u16, len))
    }
}

/// Counts the entries of a directory, such as this process's threads.
pub(super) fn count(directory: &str) -> usize {
    std::fs::read_dir(directory).unwrap().count()
}

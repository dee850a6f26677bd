//! Buses: the devices at the addresses of ports and of memory-mapped registers.

use std::sync::{Arc, Mutex};

use crate::sync::lock;

/// A device whose registers the guest reads and writes.
pub trait BusDevice: Send {
    /// Fills `data`, which is zero, from the register at `offset`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes `data` to the register at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A range of addresses and its device.
#[derive(Clone)]
struct AddressRange {
    start: u64,
    len: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// The devices of one address space: ports, or memory-mapped registers.
#[derive(Clone, Default)]
pub struct Bus {
    ranges: Vec<AddressRange>,
}

impl Bus {
    /// Adds a device at `start..start + len`. Ranges must not overlap.
    pub fn insert(&mut self, start: u64, len: u64, device: Arc<Mutex<dyn BusDevice>>) {
        debug_assert!(
            self.ranges.iter().all(|r| start + len <= r.start || r.start + r.len <= start)
        );
        self.ranges.push(AddressRange { start, len, device });
    }

    /// Reads from the device at `address`. Without a device `data` becomes all ones, as on real
    /// buses.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((range, offset)) => {
                data.fill(0);
                lock(&range.device).read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// Writes to the device at `address`. Without a device the write is dropped, as on real buses.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((range, offset)) = self.find(address, data.len()) {
            lock(&range.device).write(offset, data);
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(&AddressRange, u64)> {
        self.ranges.iter().find_map(|range| {
            let offset = address.checked_sub(range.start)?;
            let end = offset.checked_add(len as u64)?;
            (end <= range.len).then_some((range, offset))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Register(u8);
    impl BusDevice for Register {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data[0] = self.0 + offset as u8;
        }
        fn write(&mut self, _: u64, data: &[u8]) {
            self.0 = data[0];
        }
    }

    #[test]
    fn an_access_that_leaves_its_device_reaches_nobody() {
        let mut bus = Bus::default();
        bus.insert(0x10, 4, Arc::new(Mutex::new(Register(7))));
        let mut data = [0; 2];
        bus.read(0x12, &mut data);
        assert_eq!(data, [9, 0]);
        for address in [0xf, 0x13, u64::MAX] {
            bus.write(address, &[1, 1]);
            bus.read(address, &mut data);
            assert_eq!(data, [0xff, 0xff]);
        }
    }
}

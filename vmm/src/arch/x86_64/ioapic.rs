//! The IO-APIC: a table of the message that each interrupt line sends to the local APICs.
//!
//! The registers follow Intel's 82093AA data sheet, chapter 3, with as many lines as there are
//! devices. KVM's own IO-APIC has 24 lines, and comes with the two interrupt controllers of the
//! first PCs. A kernel that finds those controllers spends most exits of its boot on clearing them.
//! With this one KVM sends a line's message as soon as the line's eventfd is written, without a
//! thread between.

use std::io;

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi,
};
use serde::{Deserialize, Serialize};

use super::layout;
use crate::bus::BusDevice;

/// Most lines of an IO-APIC.
pub const MAX_LINES: usize = layout::IRQ_LAST as usize + 1;

/// Size of the register window in bytes: two registers, and the space between them.
pub const SIZE: u64 = 0x20;

// Offsets in the window.
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

// Registers that can be selected.
const ID: u8 = 0x00;
const VERSION: u8 = 0x01;
const ARBITRATION: u8 = 0x02;
const FIRST_ENTRY: u8 = 0x10;

/// Bits 7:0 of the version register: an IO-APIC that is not part of a chip set.
const VERSION_NUMBER: u32 = 0x11;

/// Bits of the ID register that hold the id.
const ID_BITS: u32 = 0x0f00_0000;

// Bits of an entry of the redirection table.
const VECTOR: u64 = 0xff;
const DELIVERY_MODE: u64 = 0x7 << 8;
const LOGICAL: u64 = 1 << 11;
const DELIVERING: u64 = 1 << 12;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const DESTINATION_SHIFT: u32 = 56;

/// Address of messages to local APICs (SDM 3, 12.11.1, "Message Address Register Format").
const MESSAGE_ADDRESS: u32 = 0xfee0_0000;

/// The registers as the guest has written them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    select: u8,
    id: u32,
    /// The redirection table: one entry for each line.
    entries: Vec<u64>,
}

/// Passes the routes of all lines that send a message to KVM.
type Route = Box<dyn FnMut(&KvmIrqRouting) -> io::Result<()> + Send>;

/// An IO-APIC.
pub struct IoApic {
    state: IoApicState,
    route: Route,
    /// Receives KVM's refusal of a route: the guest would wait for its devices for ever.
    failed: Box<dyn FnMut(io::Error) + Send>,
}

impl IoApic {
    /// Creates an IO-APIC without lines. It calls `route` for each change of a line's message, and
    /// `failed` when `route` refuses one.
    pub fn new(
        route: impl FnMut(&KvmIrqRouting) -> io::Result<()> + Send + 'static,
        failed: impl FnMut(io::Error) + Send + 'static,
    ) -> Self {
        Self { state: IoApicState::default(), route: Box::new(route), failed: Box::new(failed) }
    }

    /// Adds the lines up to `line`, a number below [`MAX_LINES`]. They are masked, as at power-on.
    pub fn add_line(&mut self, line: u32) {
        let lines = (line as usize + 1).min(MAX_LINES);
        self.state.entries.resize(lines.max(self.state.entries.len()), MASKED);
    }

    /// Returns the registers as the guest has written them.
    pub fn state(&self) -> &IoApicState {
        &self.state
    }

    /// Takes on the registers of another IO-APIC with as many lines.
    ///
    /// # Errors
    ///
    /// When the number of lines differs, or KVM refuses the routes.
    pub fn restore(&mut self, state: &IoApicState) -> io::Result<()> {
        if state.entries.len() != self.state.entries.len() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.state = state.clone();
        (self.route)(&routes(&self.state.entries)?)
    }

    /// Returns the line whose entry has one half in `register`, and whether that is the upper half.
    fn half(&self, register: u8) -> Option<(usize, bool)> {
        let at = usize::from(register.checked_sub(FIRST_ENTRY)?);
        (at / 2 < self.state.entries.len()).then_some((at / 2, at % 2 == 1))
    }

    fn selected(&self) -> u32 {
        match self.state.select {
            ID | ARBITRATION => self.state.id,
            // Bits 23:16 hold the number of the last line.
            VERSION => VERSION_NUMBER | (self.state.entries.len() as u32).saturating_sub(1) << 16,
            register => match self.half(register) {
                Some((line, true)) => (self.state.entries[line] >> 32) as u32,
                Some((line, false)) => self.state.entries[line] as u32,
                None => 0,
            },
        }
    }

    fn write_selected(&mut self, value: u32) {
        if self.state.select == ID {
            self.state.id = value & ID_BITS;
        }
        let Some((line, high)) = self.half(self.state.select) else { return };
        let old = self.state.entries[line];
        let value = u64::from(value);
        let new = if high {
            old & 0xffff_ffff | value << 32
        } else {
            // The guest cannot write two bits: a message on its way, and a level interrupt without
            // its acknowledgement. The lines here have neither.
            old & !0xffff_ffff | value & !(DELIVERING | REMOTE_IRR)
        };
        self.state.entries[line] = new;
        if message(old) != message(new) {
            let told = routes(&self.state.entries).and_then(|routes| (self.route)(&routes));
            if let Err(error) = told {
                (self.failed)(error);
            }
        }
    }
}

impl BusDevice for IoApic {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            SELECT => self.state.select.into(),
            WINDOW => self.selected(),
            _ => 0,
        };
        // The data sheet allows reads of whole registers only.
        if data.len() == size_of::<u32>() {
            data.copy_from_slice(&value.to_le_bytes());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(bytes) = data.try_into() else { return };
        let value = u32::from_le_bytes(bytes);
        match offset {
            SELECT => self.state.select = value as u8,
            WINDOW => self.write_selected(value),
            _ => {}
        }
    }
}

/// Returns the message of a line with this entry: address and data. A masked line has none, and an
/// interrupt that it signals meanwhile is not kept (data sheet, 3.2.4, "Interrupt Mask").
fn message(entry: u64) -> Option<(u32, u32)> {
    if entry & MASKED != 0 {
        return None;
    }
    let destination = (entry >> DESTINATION_SHIFT) as u32;
    let logical = if entry & LOGICAL != 0 { 1 << 2 } else { 0 };
    // SDM 3, 12.11.2, "Message Data Register Format": the same bits, except for the level itself.
    let data = entry & (VECTOR | DELIVERY_MODE | LEVEL);
    Some((MESSAGE_ADDRESS | destination << 12 | logical, data as u32))
}

/// Returns the routes of all lines that send a message.
fn routes(entries: &[u64]) -> io::Result<KvmIrqRouting> {
    let route = |(line, entry): (usize, &u64)| {
        let (address_lo, data) = message(*entry)?;
        let msi = kvm_irq_routing_msi { address_lo, data, ..Default::default() };
        Some(kvm_irq_routing_entry {
            gsi: line as u32,
            type_: KVM_IRQ_ROUTING_MSI,
            u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
            ..Default::default()
        })
    };
    let all: Vec<_> = entries.iter().enumerate().filter_map(route).collect();
    KvmIrqRouting::from_entries(&all).map_err(|_| io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// A line, the address of its message, and the data.
    type Told = Vec<(u32, u32, u32)>;

    /// An IO-APIC, and the routes that it has passed on.
    fn chip() -> (IoApic, Arc<Mutex<Vec<Told>>>) {
        let told = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&told);
        let route = move |routes: &KvmIrqRouting| {
            let read = |route: &kvm_irq_routing_entry| {
                assert_eq!(route.type_, KVM_IRQ_ROUTING_MSI);
                // SAFETY: the type makes this member of the union the valid one.
                let msi = unsafe { route.u.msi };
                (route.gsi, msi.address_lo, msi.data)
            };
            heard.lock().unwrap().push(routes.as_slice().iter().map(read).collect());
            Ok(())
        };
        let mut chip = IoApic::new(route, |error| panic!("{error}"));
        chip.add_line(19);
        (chip, told)
    }

    fn write(chip: &mut IoApic, register: u8, value: u32) {
        chip.write(SELECT, &u32::from(register).to_le_bytes());
        chip.write(WINDOW, &value.to_le_bytes());
    }

    fn read(chip: &mut IoApic, register: u8) -> u32 {
        let mut bytes = [0; 4];
        chip.write(SELECT, &u32::from(register).to_le_bytes());
        chip.read(WINDOW, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn it_says_how_many_lines_it_has() {
        let (mut chip, _) = chip();
        assert_eq!(read(&mut chip, VERSION), 0x0013_0011);
        chip.add_line(3);
        assert_eq!(read(&mut chip, VERSION), 0x0013_0011);
        write(&mut chip, ID, 0xffff_ffff);
        assert_eq!(read(&mut chip, ID), 0x0f00_0000);
        assert_eq!(read(&mut chip, ARBITRATION), 0x0f00_0000);
    }

    #[test]
    fn a_line_sends_what_its_entry_says_from_when_it_is_unmasked() {
        let (mut chip, told) = chip();
        // The order of Linux: upper half, lower half still masked, then unmasked.
        write(&mut chip, 0x10 + 2 * 5 + 1, 0x0300_0000);
        write(&mut chip, 0x10 + 2 * 5, 0x0001_0931);
        assert!(told.lock().unwrap().is_empty());
        write(&mut chip, 0x10 + 2 * 5, 0x0000_0931);
        assert_eq!(told.lock().unwrap().pop().unwrap(), [(5, 0xfee0_3004, 0x0131)]);
        assert_eq!(read(&mut chip, 0x10 + 2 * 5), 0x0000_0931);
        assert_eq!(read(&mut chip, 0x10 + 2 * 5 + 1), 0x0300_0000);
        // A level interrupt, to a processor by its APIC id.
        write(&mut chip, 0x10 + 2 * 19, 0x0000_8042);
        let both = [(5, 0xfee0_3004, 0x0131), (19, 0xfee0_0000, 0x8042)];
        assert_eq!(told.lock().unwrap().pop().unwrap(), both);
        // A write that changes nothing passes no routes on.
        write(&mut chip, 0x10 + 2 * 19, 0x0000_8042);
        assert!(told.lock().unwrap().is_empty());
        write(&mut chip, 0x10 + 2 * 5, 0x0001_0931);
        assert_eq!(told.lock().unwrap().pop().unwrap(), [(19, 0xfee0_0000, 0x8042)]);
    }

    #[test]
    fn bits_of_the_chip_are_not_for_writing() {
        let (mut chip, _) = chip();
        write(&mut chip, 0x10, 0xffff_ffff);
        assert_eq!(read(&mut chip, 0x10), 0xffff_afff);
    }

    #[test]
    fn registers_that_are_not_there_do_nothing() {
        let (mut chip, told) = chip();
        for register in (0..=0xff).filter(|r| !(0x10..0x38).contains(r) && *r != ID) {
            write(&mut chip, register, 0);
        }
        for odd in [1, 2, 3, 8] {
            chip.write(WINDOW, &vec![0; odd]);
            chip.read(WINDOW, &mut vec![0; odd]);
        }
        chip.write(0x04, &[0; 4]);
        assert_eq!(read(&mut chip, 0x0f), 0);
        assert_eq!(read(&mut chip, 0x38), 0);
        assert_eq!(read(&mut chip, 0xff), 0);
        assert_eq!(chip.state().entries, [MASKED; 20]);
        assert!(told.lock().unwrap().is_empty());
    }

    #[test]
    fn another_becomes_the_same() {
        let (mut from, _) = chip();
        let (mut to, told) = chip();
        write(&mut from, 0x10 + 2 * 9, 0x0000_0031);
        to.restore(&from.state().clone()).unwrap();
        assert_eq!(told.lock().unwrap().pop().unwrap(), [(9, 0xfee0_0000, 0x31)]);
        assert_eq!(to.state(), from.state());
        let fewer = IoApicState { entries: vec![MASKED; 19], ..IoApicState::default() };
        assert!(to.restore(&fewer).is_err());
    }
}

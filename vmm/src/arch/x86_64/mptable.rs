//! The MP table: processors and interrupts of a machine without ACPI.
//!
//! The layout follows the MultiProcessor Specification 1.4, chapter 4.

use std::ops::RangeInclusive;

use vm_memory::{Bytes, GuestAddress};

use super::layout;
use crate::memory::{GuestRam, MemoryError};

const OEM_ID: &[u8; 8] = b"ISOPOD  ";
const PRODUCT_ID: &[u8; 12] = b"MICROVM     ";
const SPEC_REVISION: u8 = 4;
// The version register of KVM's in-kernel local APIC.
const APIC_VERSION: u8 = 0x14;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const CPU_ENABLED: u8 = 1;
const CPU_BOOTSTRAP: u8 = 2;

const INTERRUPT_INT: u8 = 0;
const INTERRUPT_NMI: u8 = 1;

/// Writes the table for `vcpus` processors and for the interrupt lines that have a device. The
/// kernel sets up each line in the table, which takes about ten exits.
pub fn write(ram: &GuestRam, vcpus: u8, irqs: RangeInclusive<u8>) -> Result<(), MemoryError> {
    let table = config_table(vcpus, irqs);
    let mut bytes = floating_pointer();
    bytes.extend_from_slice(&table);
    debug_assert!(bytes.len() as u64 <= layout::MPTABLE_END - layout::MPTABLE_START);
    ram.memory()
        .write_slice(&bytes, GuestAddress(layout::MPTABLE_START))
        .map_err(|source| MemoryError::Access { what: "MP table", source })
}

fn floating_pointer() -> Vec<u8> {
    const LEN: u32 = 16;
    let table_at = layout::MPTABLE_START as u32 + LEN;
    let mut b = Vec::with_capacity(LEN as usize);
    b.extend_from_slice(b"_MP_");
    b.extend_from_slice(&table_at.to_le_bytes());
    b.extend_from_slice(&[1, SPEC_REVISION, 0]); // length in 16-byte units, revision, checksum
    b.extend_from_slice(&[0; 5]); // no default configuration, no IMCR
    b[10] = checksum(&b);
    b
}

fn config_table(vcpus: u8, irqs: RangeInclusive<u8>) -> Vec<u8> {
    // The IO-APIC has the first id that no processor has.
    let ioapic_id = vcpus;
    let mut entries = Vec::with_capacity(1024);
    let mut count: u16 = 0;
    let mut push = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..vcpus {
        let flags = CPU_ENABLED | if id == 0 { CPU_BOOTSTRAP } else { 0 };
        let mut entry = [0u8; 20];
        entry[..4].copy_from_slice(&[ENTRY_PROCESSOR, id, APIC_VERSION, flags]);
        entry[4..8].copy_from_slice(&0x600u32.to_le_bytes()); // family 6
        entry[8..12].copy_from_slice(&0x201u32.to_le_bytes()); // FPU and APIC
        push(&entry);
    }
    push(&[ENTRY_BUS, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let mut ioapic = [ENTRY_IOAPIC, ioapic_id, APIC_VERSION, 1, 0, 0, 0, 0];
    ioapic[4..].copy_from_slice(&layout::IOAPIC_START.to_le_bytes());
    push(&ioapic);
    for irq in irqs {
        push(&[ENTRY_INTERRUPT, INTERRUPT_INT, 0, 0, 0, irq, ioapic_id, irq]);
    }
    push(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_NMI, 0, 0, 0, 0, 0xff, 1]);

    let mut b = Vec::with_capacity(44 + entries.len());
    b.extend_from_slice(b"PCMP");
    b.extend_from_slice(&(44 + entries.len() as u16).to_le_bytes());
    b.extend_from_slice(&[SPEC_REVISION, 0]);
    b.extend_from_slice(OEM_ID);
    b.extend_from_slice(PRODUCT_ID);
    b.extend_from_slice(&[0; 6]); // no OEM table
    b.extend_from_slice(&count.to_le_bytes());
    b.extend_from_slice(&layout::APIC_START.to_le_bytes());
    b.extend_from_slice(&[0; 4]); // no extended table
    b.extend_from_slice(&entries);
    b[7] = checksum(&b);
    b
}

/// Returns the byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_zero_and_the_largest_fits() {
        let sum = |b: &[u8]| b.iter().fold(0u8, |s, x| s.wrapping_add(*x));
        let pointer = floating_pointer();
        let table = config_table(crate::config::MAX_VCPUS, 0..=layout::IRQ_LAST as u8);
        assert_eq!((sum(&pointer), sum(&table)), (0, 0));
        assert_eq!(pointer.len(), 16);
        assert!(
            (pointer.len() + table.len()) as u64 <= layout::MPTABLE_END - layout::MPTABLE_START
        );
    }

    #[test]
    fn the_header_counts_its_entries_and_its_length() {
        let table = config_table(2, 5..=8);
        assert_eq!(u16::from_le_bytes([table[4], table[5]]) as usize, table.len());
        // 2 processors, a bus, an IO-APIC, 4 interrupt lines, a local interrupt.
        assert_eq!(u16::from_le_bytes([table[34], table[35]]), 9);
    }
}

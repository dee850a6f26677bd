//! Guest physical addresses and interrupt lines.
//!
//! ```text
//! 0x0000_0500  boot GDT            0x000a_0000  hole (legacy video and ROM)
//! 0x0000_7000  boot_params         0x0010_0000  RAM: kernel, ..., initramfs at the top
//! 0x0000_9000  boot page tables    0xc000_0000  hole: virtio-mmio, IO-APIC, local APIC
//! 0x0002_0000  command line        0x1_0000_0000  the rest of the RAM
//! 0x0009_fc00  MP table
//! ```

/// Length of a page, in bytes (SDM volume 3, 4.3).
pub const PAGE_SIZE: u64 = 4096;

/// Boot GDT, in free memory behind the BIOS data area.
pub const BOOT_GDT_START: u64 = 0x500;

/// The `boot_params` page ("zero page").
pub const ZERO_PAGE_START: u64 = 0x7000;

/// Initial stack pointer. The kernel sets its own before it uses the stack.
pub const BOOT_STACK_POINTER: u64 = 0x8ff0;

/// Boot page tables: PML4, PDPT and one page directory, a page each.
pub const PML4_START: u64 = 0x9000;
/// See [`PML4_START`].
pub const PDPT_START: u64 = 0xa000;
/// See [`PML4_START`].
pub const PD_START: u64 = 0xb000;

/// Kernel command line.
pub const CMDLINE_START: u64 = 0x2_0000;

/// MP floating pointer structure and MP table. The kernel searches the last KiB of base memory
/// (MultiProcessor Specification 1.4, 4).
pub const MPTABLE_START: u64 = 0x9_fc00;

/// End of the room for the MP table.
pub const MPTABLE_END: u64 = 0xa_0000;

/// Start of memory above the legacy hole.
pub const HIMEM_START: u64 = 0x10_0000;

/// Start of the hole below 4 GiB that has no RAM.
pub const MMIO_GAP_START: u64 = 0xc000_0000;

/// End of the hole, where RAM continues.
pub const MMIO_GAP_END: u64 = 0x1_0000_0000;

/// First virtio-mmio register window.
pub const VIRTIO_MMIO_START: u64 = 0xd000_0000;

/// Size of a virtio-mmio register window.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;

/// Size of all windows: one for each interrupt line.
pub const VIRTIO_MMIO_LEN: u64 = (IRQ_LAST - VIRTIO_IRQ_FIRST + 1) as u64 * VIRTIO_MMIO_SIZE;

/// IO-APIC registers, at the address that PCs use.
pub const IOAPIC_START: u32 = 0xfec0_0000;

/// Local APIC registers (`APIC_DEFAULT_PHYS_BASE`).
pub const APIC_START: u32 = 0xfee0_0000;

/// Three pages for real mode, required by KVM on Intel (`KVM_SET_TSS_ADDR`).
pub const KVM_TSS_START: usize = 0xfffb_d000;

/// One page before those, required by KVM on Intel (`KVM_SET_IDENTITY_MAP_ADDR`).
pub const KVM_IDENTITY_MAP_START: u64 = 0xfffb_c000;

/// First interrupt line for virtio-mmio devices. Linux gives no device interrupt 0.
pub const VIRTIO_IRQ_FIRST: u32 = 1;

/// Last interrupt line that a device can have.
pub const IRQ_LAST: u32 = 19;

/// First serial port.
pub const SERIAL_PORT: u16 = 0x3f8;

/// Command port of the i8042 keyboard controller, whose reset line restarts a PC.
pub const I8042_COMMAND_PORT: u16 = 0x64;

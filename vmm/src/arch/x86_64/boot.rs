//! Loads the initramfs and writes the boot parameters into guest memory.

use std::fs::File;
use std::os::unix::fs::FileExt;

use linux_loader::cmdline::Cmdline;
use linux_loader::configurator::{BootConfigurator, BootParams, linux::LinuxBootConfigurator};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryRegion};

use super::layout::{self, PAGE_SIZE};
use crate::config::MAX_CMDLINE_LEN;
use crate::image::Chunked;
use crate::memory::{GuestRam, MemoryError};

// Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const LOADER_UNDEFINED: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x20_0000;

// arch/x86/include/uapi/asm/e820.h
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// First bytes of a newc cpio archive, with and without checksums.
const CPIO_MAGICS: [&[u8; 6]; 2] = [b"070701", b"070702"];

/// Name of the last entry of a cpio archive.
const CPIO_TRAILER: &[u8] = b"TRAILER!!!";

/// Length of the file's end in which the last entry is searched, in bytes. `cpio` pads the archive
/// to blocks behind that entry: of 512 bytes by default, of 5120 with `-B`.
const CPIO_TAIL_LEN: u64 = 8192;

/// Reasons why the guest cannot get its kernel or its image.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel file is not a loadable `vmlinux`.
    #[error(
        "{path}: not a bootable x86-64 vmlinux: {source}; rebuild or reinstall the guest kernel"
    )]
    Kernel {
        /// The kernel file.
        path: String,
        /// The error of linux-loader.
        source: linux_loader::loader::Error,
    },
    /// The kernel is for another processor architecture.
    #[error("{0}: the kernel is not for x86-64; rebuild or reinstall the guest kernel")]
    OtherMachine(String),
    /// The kernel cannot be shared, although the configuration asks for it.
    #[error("{path}: microVMs cannot share this kernel: {source}; set share_kernel to false")]
    Unshared {
        /// The kernel file.
        path: String,
        /// The cause.
        source: std::io::Error,
    },
    /// The image file is not a cpio archive.
    #[error("{0}: not a newc cpio archive; rebuild or reinstall the guest image")]
    NoArchive(String),
    /// The image file ends too early.
    #[error("{0}: cut short; rebuild or reinstall the guest image")]
    CutShort(String),
    /// The image file could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The image file.
        path: String,
        /// The cause.
        source: std::io::Error,
    },
    /// Kernel and image are larger than the memory.
    #[error(
        "{path}: {len} bytes do not fit beside the kernel in guest memory; \
         raise the sandbox's memory size"
    )]
    NoRoom {
        /// The image file.
        path: String,
        /// Length of the image in bytes.
        len: u64,
    },
    /// The command line is too long.
    #[error("cannot build the kernel command line: {0}")]
    Cmdline(#[from] linux_loader::cmdline::Error),
    /// Guest memory below 1 MiB could not be written.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The boot parameters could not be written.
    #[error("cannot write the boot parameters: {0}")]
    Params(#[from] linux_loader::configurator::Error),
}

/// Reads the image to the top of the memory below 4 GiB.
///
/// # Errors
///
/// When the file is not a cpio archive, has no last entry, or does not fit above the kernel.
pub fn load_initramfs(
    ram: &GuestRam,
    file: &mut File,
    path: &str,
    kernel_end: u64,
) -> Result<Initramfs, BootError> {
    let read = |source| BootError::Read { path: path.to_owned(), source };
    let len = file.metadata().map_err(read)?.len();
    let no_room = || BootError::NoRoom { path: path.to_owned(), len };
    let start = ram.low_end().checked_sub(len).ok_or_else(no_room)? & !(PAGE_SIZE - 1);
    if start < kernel_end {
        return Err(no_room());
    }
    let mut magic = [0u8; 6];
    file.read_exact_at(&mut magic, 0).map_err(|_| BootError::NoArchive(path.to_owned()))?;
    if !CPIO_MAGICS.contains(&&magic) {
        return Err(BootError::NoArchive(path.to_owned()));
    }
    // The kernel would unpack an incomplete archive, and miss files later or not at all.
    let tail_len = len.min(CPIO_TAIL_LEN);
    let mut tail = vec![0; tail_len as usize];
    file.read_exact_at(&mut tail, len - tail_len).map_err(read)?;
    if !tail.windows(CPIO_TRAILER.len()).any(|part| part == CPIO_TRAILER) {
        return Err(BootError::CutShort(path.to_owned()));
    }
    ram.memory()
        .read_exact_volatile_from(GuestAddress(start), &mut Chunked::new(file), len as usize)
        .map_err(|source| MemoryError::Access { what: "guest image", source })?;
    Ok(Initramfs { start, len })
}

/// Place of the image in guest memory.
#[derive(Debug, Clone, Copy)]
pub struct Initramfs {
    /// Guest physical address of the first byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Writes the command line and the zero page (`boot_params`).
///
/// # Errors
///
/// When the command line is too long, or guest memory has no room for either.
pub fn write_params(
    ram: &GuestRam,
    cmdline: &Cmdline,
    initramfs: Initramfs,
) -> Result<(), BootError> {
    let text = cmdline.as_cstring()?;
    ram.memory()
        .write_slice(text.as_bytes_with_nul(), GuestAddress(layout::CMDLINE_START))
        .map_err(|source| MemoryError::Access { what: "command line", source })?;

    let mut params = boot_params::default();
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    params.hdr.cmd_line_ptr = layout::CMDLINE_START as u32;
    params.hdr.cmdline_size = text.as_bytes_with_nul().len() as u32;
    params.hdr.ramdisk_image = initramfs.start as u32;
    params.hdr.ramdisk_size = initramfs.len as u32;
    for (slot, entry) in params.e820_table.iter_mut().zip(e820(ram)) {
        *slot = entry;
        params.e820_entries += 1;
    }
    let params = BootParams::new::<boot_params>(&params, GuestAddress(layout::ZERO_PAGE_START));
    Ok(LinuxBootConfigurator::write_bootparams(&params, ram.memory())?)
}

fn e820(ram: &GuestRam) -> Vec<boot_e820_entry> {
    let entry = |start, end, type_| boot_e820_entry { addr: start, size: end - start, type_ };
    let mut map = vec![
        entry(0, layout::MPTABLE_START, E820_RAM),
        entry(layout::MPTABLE_START, layout::MPTABLE_END, E820_RESERVED),
        entry(layout::HIMEM_START, ram.low_end(), E820_RAM),
    ];
    map.extend(
        ram.memory()
            .iter()
            .map(|region| (region.start_addr().raw_value(), region.last_addr().raw_value() + 1))
            .filter(|(start, _)| *start >= layout::MMIO_GAP_END)
            .map(|(start, end)| entry(start, end, E820_RAM)),
    );
    map
}

/// Returns an empty command line of the kernel's capacity ([`MAX_CMDLINE_LEN`]).
///
/// # Errors
///
/// Never with this capacity: only the crate's constructor is fallible.
pub fn new_cmdline() -> Result<Cmdline, BootError> {
    Ok(Cmdline::new(MAX_CMDLINE_LEN)?)
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use super::*;

    fn load(content: &[u8]) -> Result<Initramfs, BootError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file.rewind().unwrap();
        load_initramfs(&GuestRam::new(64).unwrap(), &mut file, "image", layout::HIMEM_START)
    }

    #[test]
    fn an_image_that_ends_early_is_recognised() {
        let mut image = b"070701".to_vec();
        image.extend(vec![0; 100_000]);
        image.extend(b"TRAILER!!!\0");
        let whole = image.len();
        assert_eq!(load(&image).unwrap().len, whole as u64);
        // Padded as by `cpio -B`.
        image.resize(whole + 5119, 0);
        assert!(load(&image).is_ok());
        for len in [6, 512, whole - 2, whole / 2] {
            let error = load(&image[..len]).unwrap_err().to_string();
            assert_eq!(error, "image: cut short; rebuild or reinstall the guest image");
        }
        for other in [&b""[..], b"07070", b"\x1f\x8b\x08 compressed TRAILER!!!"] {
            assert!(matches!(load(other), Err(BootError::NoArchive(_))));
        }
    }
}

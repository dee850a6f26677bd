//! Checks that a VMM can load the kernel's image, or map its pages from the file.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

const PAGE: u64 = 4096;
const PT_LOAD: u64 = 1;

/// Checks that `path` is an x86-64 ELF image with page-aligned segments.
///
/// The file offset, virtual address and physical address of a segment must be equal modulo 4096.
pub(super) fn check(path: &Path) -> Result<()> {
    let image = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    check_image(&image).with_context(|| format!("{} is no good guest kernel", path.display()))
}

fn check_image(image: &[u8]) -> Result<()> {
    if image.get(..5) != Some(b"\x7fELF\x02") || number(image, 18, 2)? != 62 {
        bail!("it is not an x86-64 ELF file");
    }
    let table = number(image, 32, 8)?;
    let mut loads = 0;
    for index in 0..number(image, 56, 2)? {
        let header = table.saturating_add(index * number(image, 54, 2)?);
        if number(image, header, 4)? != PT_LOAD {
            continue;
        }
        loads += 1;
        let [offset, virtual_at, physical] =
            [8, 16, 24].map(|field| number(image, header.saturating_add(field), 8));
        let (offset, virtual_at, physical) = (offset?, virtual_at?, physical?);
        if offset % PAGE != physical % PAGE || offset % PAGE != virtual_at % PAGE {
            bail!(
                "segment {index} is not aligned to pages: offset {offset:#x}, address {physical:#x}"
            );
        }
    }
    if loads == 0 {
        bail!("it has nothing to load");
    }
    Ok(())
}

/// The little-endian number in the `len` bytes at `offset`.
fn number(image: &[u8], offset: u64, len: usize) -> Result<u64> {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let bytes = image.get(start..).and_then(|rest| rest.get(..len)).context("it is cut short")?;
    Ok(bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(offset: u8, physical: u8) -> Vec<u8> {
        let mut image = vec![0; 64 + 56];
        image[..5].copy_from_slice(b"\x7fELF\x02");
        image[18] = 62;
        image[32] = 64;
        image[54] = 56;
        image[56] = 1;
        image[64] = 1;
        image[64 + 9] = offset;
        image[64 + 17] = physical;
        image[64 + 25] = physical;
        image
    }

    #[test]
    fn segments_have_to_be_aligned_alike() {
        check_image(&image(0x10, 0x20)).unwrap();
        check_image(&image(0x12, 0x22)).unwrap();
        assert!(check_image(&image(0x10, 0x22)).is_err());
    }

    #[test]
    fn damaged_images_are_refused() {
        assert!(check_image(b"MZ").is_err());
        let whole = image(0x10, 0x10);
        for len in 0..64 + 32 {
            assert!(check_image(&whole[..len]).is_err(), "{len} bytes");
        }
        let mut none = whole;
        none[64] = 4;
        assert!(check_image(&none).is_err());
    }
}

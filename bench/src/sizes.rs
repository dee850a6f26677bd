//! Sizes of the installed files.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::figure::Figure;

/// Figures and their files.
const FILES: [(&str, &str); 5] = [
    ("size-kernel", "vmlinux"),
    ("size-image", "isopod.initramfs"),
    ("size-isopod", "isopod"),
    ("size-isopod-vmm", "isopod-vmm"),
    ("size-isopod-agent", "isopod-agent"),
];

/// Size of each file on disk, at most its length. The kernel image has holes.
pub(crate) fn measure(programs: &Path) -> Result<Vec<Figure>> {
    FILES
        .iter()
        .map(|(figure, name)| {
            let path = programs.join(name);
            let data = fs::metadata(&path).with_context(|| path.display().to_string())?;
            let len = data.len().min(data.blocks() * 512);
            Ok(Figure::alone(*figure, "KiB", len as f64 / 1024.0))
        })
        .collect()
}

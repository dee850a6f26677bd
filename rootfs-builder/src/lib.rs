//! Builds the guest image: the initramfs of a microVM, with the agent as `/init`.
//!
//! The same agent always gives the same image, byte for byte, so an image can be cached by its
//! content. The image is not compressed. The host's page cache has one copy for all guests, and
//! decompression would cost time in every boot.

pub mod agent;
pub mod cpio;

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use agent::AgentError;
use cpio::{CpioError, Device, Writer};

/// Directories of the image, with their permission bits.
///
/// The agent mounts file systems on most of them, and makes the other directories itself.
const DIRECTORIES: [(&str, u32); 6] = [
    ("dev", 0o755),
    ("etc", 0o755),
    ("proc", 0o555),
    ("run", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
];

/// `/dev/null` (the kernel's `Documentation/admin-guide/devices.txt`).
const NULL: Device = Device { major: 1, minor: 3 };

/// `/dev/console`, from the same list.
const CONSOLE: Device = Device { major: 5, minor: 1 };

/// Error of building a guest image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The agent could not be read.
    #[error("cannot read the agent {path}: {source}")]
    ReadAgent {
        /// Path of the agent.
        path: PathBuf,
        /// Error of the read.
        source: io::Error,
    },
    /// The agent is not a program that the guest kernel can start.
    #[error("{path} cannot be the guest's /init: {source}")]
    Agent {
        /// Path of the agent.
        path: PathBuf,
        /// Reason.
        source: AgentError,
    },
    /// The image could not be written.
    #[error("cannot write the guest image {path}: {source}")]
    Write {
        /// Path of the image.
        path: PathBuf,
        /// Error of the write.
        source: CpioError,
    },
}

/// Builds the image `image` from the agent's program file `agent`. Returns its size in bytes.
///
/// An older image is replaced atomically.
///
/// # Errors
///
/// The agent must be a static x86-64 program, and `image` must be writable. After an error an older
/// image is unchanged.
pub fn build(agent: &Path, image: &Path) -> Result<u64, ImageError> {
    let program = fs::read(agent)
        .map_err(|source| ImageError::ReadAgent { path: agent.to_owned(), source })?;
    agent::check(&program)
        .map_err(|source| ImageError::Agent { path: agent.to_owned(), source })?;
    let written = replace(image, |file| {
        let mut out = BufWriter::new(file);
        let size = write(&program, &mut out)?;
        out.flush()?;
        Ok(size)
    });
    written.map_err(|source| ImageError::Write { path: image.to_owned(), source })
}

/// Writes the image with `agent` as `/init` to `out`. Returns its size in bytes.
///
/// # Errors
///
/// The agent must be smaller than 4 GiB. Errors of `out` are returned too.
pub fn write(agent: &[u8], out: impl Write) -> Result<u64, CpioError> {
    let mut archive = Writer::new(out);
    for (name, mode) in DIRECTORIES {
        archive.directory(name, mode)?;
    }
    archive.character_device("dev/null", 0o666, NULL)?;
    // The kernel opens /dev/console as the standard streams of /init.
    archive.character_device("dev/console", 0o600, CONSOLE)?;
    archive.file("init", 0o755, agent)?;
    archive.finish()
}

/// Fills a new file beside `path` and renames it to `path`.
fn replace(
    path: &Path,
    fill: impl FnOnce(&File) -> Result<u64, CpioError>,
) -> Result<u64, CpioError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}", std::process::id()));
    let new = path.with_file_name(name);
    let result = File::create(&new)
        .map_err(CpioError::from)
        .and_then(|file| fill(&file))
        .and_then(|size| Ok(fs::rename(&new, path).map(|()| size)?));
    if result.is_err() {
        // A second error is not reported.
        let _ = fs::remove_file(&new);
    }
    result
}

#[cfg(test)]
mod tests;

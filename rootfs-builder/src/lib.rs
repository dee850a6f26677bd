//! Builds the guest image: the initramfs that a microVM boots from, with the agent as `/init`.
//!
//! The same agent always gives the same image, byte for byte, so an image can be cached and shared
//! by its content. It is not compressed: the host keeps one copy of it for all guests, and a guest
//! would pay for decompression at every boot.

pub mod agent;
pub mod cpio;

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use agent::AgentError;
use cpio::{CpioError, Device, Writer};

/// Directories that the agent finds when it starts. It mounts over most of them and makes the rest
/// of its tree itself.
const DIRECTORIES: [(&str, u32); 6] = [
    ("dev", 0o755),
    ("etc", 0o755),
    ("proc", 0o555),
    ("run", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
];

/// `/dev/null` and `/dev/console` (the kernel's `Documentation/admin-guide/devices.txt`).
const NULL: Device = Device { major: 1, minor: 3 };
const CONSOLE: Device = Device { major: 5, minor: 1 };

/// Why no guest image could be built.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The agent could not be read.
    #[error("cannot read the agent {path}: {source}")]
    ReadAgent {
        /// Where it should be.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The agent is not a program that the guest kernel can start.
    #[error("{path} cannot be the guest's /init: {source}")]
    Agent {
        /// Where it is.
        path: PathBuf,
        /// What is wrong with it.
        source: AgentError,
    },
    /// The image could not be written.
    #[error("cannot write the guest image {path}: {source}")]
    Write {
        /// Where it should be.
        path: PathBuf,
        /// Why.
        source: CpioError,
    },
}

/// Builds the image `image` from the agent's program file `agent`, replacing an older one in one
/// step, and returns its size in bytes.
///
/// # Errors
///
/// An agent that is missing or not a static x86-64 program, or an image that cannot be written;
/// whatever was at `image` before is then still there.
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

/// Writes the image with `agent` as `/init` to `out` and returns its size in bytes.
///
/// # Errors
///
/// Those of `out`, or an agent of 4 GiB and more.
pub fn write(agent: &[u8], out: impl Write) -> Result<u64, CpioError> {
    let mut archive = Writer::new(out);
    for (name, mode) in DIRECTORIES {
        archive.directory(name, mode)?;
    }
    archive.character_device("dev/null", 0o666, NULL)?;
    // The kernel opens it as the standard streams of /init.
    archive.character_device("dev/console", 0o600, CONSOLE)?;
    archive.file("init", 0o755, agent)?;
    archive.finish()
}

/// Fills a new file beside `path` and then gives it that name.
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
        // The first error is the one to report.
        let _ = fs::remove_file(&new);
    }
    result
}

#[cfg(test)]
mod tests;

//! Blobs of a layout: found by their digest, and checked against digest and size while they are
//! read.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use oci_spec::image::{Descriptor, Digest, DigestAlgorithm};
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat};
use sha2::{Digest as _, Sha256, Sha512};

use crate::error::{Error, Explain, Result};

/// Largest index, manifest or configuration that is read, in bytes.
const MAX_DOCUMENT: u64 = 8 << 20;

/// Opens the blob that `descriptor` describes.
pub(super) fn open(layout: &Path, descriptor: &Descriptor) -> Result<Verified<File>> {
    let digest = descriptor.digest();
    let hash = Hash::of(digest)?;
    // The type has checked that the digest is hexadecimal, so the path cannot lead elsewhere.
    let path = layout.join("blobs").join(digest.algorithm().as_ref()).join(digest.digest());
    let file = open_regular(&path).map_err(|e| {
        let hint = match descriptor.urls().as_deref().unwrap_or_default() {
            [] => String::new(),
            [url, ..] => {
                format!(" (the image names its source as {})", crate::text::quoted(url.as_bytes()))
            }
        };
        Error::because(format!("cannot open {}{hint}", path.display()), e)
    })?;
    Ok(Verified::new(file, hash, digest.digest(), Some(descriptor.size())))
}

/// Reads and checks a blob of at most [`MAX_DOCUMENT`] bytes, which is held in memory whole.
pub(super) fn read(layout: &Path, descriptor: &Descriptor) -> Result<Vec<u8>> {
    let what = || format!("cannot read blob {}", descriptor.digest());
    if descriptor.size() > MAX_DOCUMENT {
        let size = descriptor.size();
        return Err(Error::new(format!("{}: {size} bytes are more than is sensible", what())));
    }
    let mut blob = open(layout, descriptor)?;
    let mut bytes = Vec::new();
    blob.read_to_end(&mut bytes).explain(what)?;
    blob.finish().explain(what)?;
    Ok(bytes)
}

/// Reads a file of the layout that has no digest, of at most [`MAX_DOCUMENT`] bytes.
pub(super) fn read_file(path: &Path) -> Result<Vec<u8>> {
    let what = || format!("cannot read {}", path.display());
    let mut bytes = Vec::new();
    let file = open_regular(path).explain(what)?;
    file.take(MAX_DOCUMENT + 1).read_to_end(&mut bytes).explain(what)?;
    if bytes.len() as u64 > MAX_DOCUMENT {
        return Err(Error::new(format!("{}: it is larger than {MAX_DOCUMENT} bytes", what())));
    }
    Ok(bytes)
}

/// Opens a regular file. A named pipe or a device would make the caller wait.
fn open_regular(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = openat(CWD, path, flags, Mode::empty())?;
    if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::RegularFile {
        return Err(io::Error::other("it is not a regular file"));
    }
    Ok(file.into())
}

/// A running hash, by an algorithm that images use.
#[derive(Debug, Clone)]
pub(super) enum Hash {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Hash {
    /// A new hash by the algorithm of `digest`.
    pub(super) fn of(digest: &Digest) -> Result<Self> {
        match digest.algorithm() {
            DigestAlgorithm::Sha256 => Ok(Self::Sha256(Sha256::new())),
            DigestAlgorithm::Sha512 => Ok(Self::Sha512(Sha512::new())),
            other => Err(Error::new(format!(
                "digest {digest} is of the kind {other}, which is not supported: sha256 and sha512 are"
            ))),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::Sha512(hash) => hash.update(bytes),
        }
    }

    fn hex(self) -> String {
        let bytes = match self {
            Self::Sha256(hash) => hash.finalize().to_vec(),
            Self::Sha512(hash) => hash.finalize().to_vec(),
        };
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// A reader that checks its content against a digest, and against a size if there is one.
#[derive(Debug)]
pub(super) struct Verified<R> {
    source: R,
    hash: Hash,
    expected: String,
    size: Option<u64>,
    read: u64,
}

impl<R: Read> Verified<R> {
    pub(super) fn new(source: R, hash: Hash, expected: &str, size: Option<u64>) -> Self {
        Self { source, hash, expected: expected.to_owned(), size, read: 0 }
    }

    /// Reads the rest, and compares size and digest.
    pub(super) fn finish(mut self) -> io::Result<()> {
        let mut rest = vec![0; 64 << 10];
        while self.read(&mut rest)? > 0 {}
        if let Some(size) = self.size.filter(|size| *size != self.read) {
            let read = self.read;
            return Err(invalid(format!("it has {read} bytes and should have {size}")));
        }
        let found = self.hash.hex();
        if found == self.expected {
            return Ok(());
        }
        Err(invalid(format!("it is damaged: its content has the digest {found}")))
    }
}

impl<R: Read> Read for Verified<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.source.read(buffer)?;
        self.hash.update(&buffer[..n]);
        self.read += n as u64;
        match self.size {
            Some(size) if self.read > size => {
                Err(invalid(format!("it is larger than the {size} bytes that it should have")))
            }
            _ => Ok(n),
        }
    }
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

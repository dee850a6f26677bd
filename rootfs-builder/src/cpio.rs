//! The archive format of an initramfs: `newc` cpio, as in the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst`.

use std::io::{self, Write};

/// File type bits of `c_mode`.
const S_IFDIR: u32 = 0o040_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFREG: u32 = 0o100_000;

/// Name of the entry that ends an archive.
const TRAILER: &str = "TRAILER!!!";

/// Headers and contents begin at multiples of this.
const ALIGNMENT: u64 = 4;

/// Why an archive could not be written.
#[derive(Debug, thiserror::Error)]
pub enum CpioError {
    /// The output failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The format has 32 bits for a size.
    #[error("{name} has {len} bytes; an archive takes less than 4 GiB a file")]
    TooLarge {
        /// Which file.
        name: String,
        /// Its size in bytes.
        len: u64,
    },
}

/// Numbers of a device node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// Major number: the driver.
    pub major: u32,
    /// Minor number: which of the driver's devices.
    pub minor: u32,
}

/// Writes an archive, an entry at a time. Every entry belongs to root and has the time 0; inode
/// numbers are given in order. The kernel needs a directory before what is in it.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    written: u64,
    last_inode: u32,
}

/// What goes into a header besides the name.
struct Entry {
    mode: u32,
    links: u32,
    device: Device,
}

impl<W: Write> Writer<W> {
    /// An empty archive on `out`.
    pub fn new(out: W) -> Self {
        Self { out, written: 0, last_inode: 0 }
    }

    /// Adds the directory `name` (a path without a leading slash) with permission bits `mode`.
    ///
    /// # Errors
    ///
    /// Those of the output.
    pub fn directory(&mut self, name: &str, mode: u32) -> Result<(), CpioError> {
        self.entry(name, &Entry::new(S_IFDIR | mode, 2), &[])
    }

    /// Adds a character device node.
    ///
    /// # Errors
    ///
    /// Those of the output.
    pub fn character_device(
        &mut self,
        name: &str,
        mode: u32,
        device: Device,
    ) -> Result<(), CpioError> {
        self.entry(name, &Entry { device, ..Entry::new(S_IFCHR | mode, 1) }, &[])
    }

    /// Adds a regular file.
    ///
    /// # Errors
    ///
    /// [`CpioError::TooLarge`] from 4 GiB, and those of the output.
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<(), CpioError> {
        self.entry(name, &Entry::new(S_IFREG | mode, 1), content)
    }

    /// Ends the archive and returns its size in bytes.
    ///
    /// # Errors
    ///
    /// Those of the output.
    pub fn finish(mut self) -> Result<u64, CpioError> {
        self.last_inode = 0;
        self.header(TRAILER, 0, &Entry::new(0, 1), 0)?;
        Ok(self.written)
    }

    fn entry(&mut self, name: &str, entry: &Entry, content: &[u8]) -> Result<(), CpioError> {
        let len = u32::try_from(content.len()).map_err(|_| CpioError::TooLarge {
            name: name.to_owned(),
            len: content.len() as u64,
        })?;
        self.last_inode += 1;
        self.header(name, self.last_inode, entry, len)?;
        self.put(content)?;
        self.pad()
    }

    fn header(&mut self, name: &str, inode: u32, entry: &Entry, len: u32) -> Result<(), CpioError> {
        let (uid, gid, mtime, checksum) = (0, 0, 0, 0);
        let name_len = u32::try_from(name.len() + 1).map_err(|_| CpioError::TooLarge {
            name: "a name".to_owned(),
            len: name.len() as u64,
        })?;
        let Device { major, minor } = entry.device;
        // The two numbers before the device's own are those of the file system it came from.
        let fields = [
            inode,
            entry.mode,
            uid,
            gid,
            entry.links,
            mtime,
            len,
            0,
            0,
            major,
            minor,
            name_len,
            checksum,
        ];
        self.put(b"070701")?;
        for field in fields {
            self.put(format!("{field:08X}").as_bytes())?;
        }
        self.put(name.as_bytes())?;
        self.put(b"\0")?;
        self.pad()
    }

    fn pad(&mut self) -> Result<(), CpioError> {
        let missing = self.written.next_multiple_of(ALIGNMENT) - self.written;
        let zeros = [0; ALIGNMENT as usize];
        self.put(zeros.get(..usize::try_from(missing).unwrap_or(0)).unwrap_or(&zeros))
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), CpioError> {
        self.out.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }
}

impl Entry {
    fn new(mode: u32, links: u32) -> Self {
        Self { mode, links, device: Device { major: 0, minor: 0 } }
    }
}

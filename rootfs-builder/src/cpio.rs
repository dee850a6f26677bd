//! The archive format of an initramfs: `newc` cpio, described in the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst`.

use std::io::{self, Write};

/// File type bits of `c_mode`: directory.
const S_IFDIR: u32 = 0o040_000;

/// File type bits of `c_mode`: character device.
const S_IFCHR: u32 = 0o020_000;

/// File type bits of `c_mode`: regular file.
const S_IFREG: u32 = 0o100_000;

/// Name of the last entry of an archive.
const TRAILER: &str = "TRAILER!!!";

/// Alignment in bytes of headers and contents.
const ALIGNMENT: u64 = 4;

/// Error of writing an archive.
#[derive(Debug, thiserror::Error)]
pub enum CpioError {
    /// Error of the output.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// File or name of 4 GiB or more: the format has 32 bits for a size.
    #[error("{name} has {len} bytes; an archive takes less than 4 GiB a file")]
    TooLarge {
        /// Name of the entry.
        name: String,
        /// Size in bytes.
        len: u64,
    },
}

/// Numbers of a device node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// Major number: selects the driver.
    pub major: u32,
    /// Minor number: selects the driver's device.
    pub minor: u32,
}

/// Writes an archive, one entry after the other.
///
/// Entries have the owner root, the time 0, and inode numbers from 1 on. A directory must come
/// before its contents: the kernel unpacks the entries in order.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    written: u64,
    last_inode: u32,
}

/// Fields of a header that depend on the type of the entry.
struct Header {
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
    pub fn directory(&mut self, name: &str, mode: u32) -> Result<(), CpioError> {
        self.entry(name, &Header::new(S_IFDIR | mode, 2), &[])
    }

    /// Adds a character device node.
    pub fn character_device(
        &mut self,
        name: &str,
        mode: u32,
        device: Device,
    ) -> Result<(), CpioError> {
        self.entry(name, &Header { device, ..Header::new(S_IFCHR | mode, 1) }, &[])
    }

    /// Adds a regular file.
    ///
    /// # Errors
    ///
    /// [`CpioError::TooLarge`] for 4 GiB or more, and errors of the output.
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<(), CpioError> {
        self.entry(name, &Header::new(S_IFREG | mode, 1), content)
    }

    /// Ends the archive. Returns its size in bytes.
    pub fn finish(mut self) -> Result<u64, CpioError> {
        self.last_inode = 0;
        self.header(TRAILER, 0, &Header::new(0, 1), 0)?;
        Ok(self.written)
    }

    fn entry(&mut self, name: &str, head: &Header, content: &[u8]) -> Result<(), CpioError> {
        let len = u32::try_from(content.len()).map_err(|_| CpioError::TooLarge {
            name: name.to_owned(),
            len: content.len() as u64,
        })?;
        self.last_inode += 1;
        self.header(name, self.last_inode, head, len)?;
        self.put(content)?;
        self.pad()
    }

    fn header(&mut self, name: &str, inode: u32, head: &Header, len: u32) -> Result<(), CpioError> {
        let (uid, gid, mtime, checksum) = (0, 0, 0, 0);
        let name_len = u32::try_from(name.len() + 1).map_err(|_| CpioError::TooLarge {
            name: "a name".to_owned(),
            len: name.len() as u64,
        })?;
        let Device { major, minor } = head.device;
        // The two zeros are the device number of the source's file system.
        let fields = [
            inode, head.mode, uid, gid, head.links, mtime, len, 0, 0, major, minor, name_len,
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

impl Header {
    fn new(mode: u32, links: u32) -> Self {
        Self { mode, links, device: Device { major: 0, minor: 0 } }
    }
}

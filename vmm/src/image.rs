//! Reading kernel and image into guest memory without delaying the host.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::thread;

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

/// Bytes read between two yields.
const CHUNK_LEN: usize = 1 << 20;

/// A file that is read in chunks, with a yield after each.
///
/// A processor in the middle of a long `read` is never in a quiescent state, so no RCU grace period
/// of the host can end. KVM waits for grace periods while another thread makes the machine. A yield
/// is a quiescent state and costs almost nothing.
#[derive(Debug)]
pub struct Chunked<'f> {
    file: &'f mut File,
    /// Parts of the file that are skipped.
    mapped: &'f [Range<u64>],
}

impl<'f> Chunked<'f> {
    /// Reads all of `file`.
    pub fn new(file: &'f mut File) -> Self {
        Self::without(file, &[])
    }

    /// Reads `file` without its `mapped` parts, whose place in guest memory is not written. A
    /// read that begins in such a part skips the rest of it.
    pub fn without(file: &'f mut File, mapped: &'f [Range<u64>]) -> Self {
        Self { file, mapped }
    }

    /// Skips a mapped part at the file's position, at most `len` bytes. Returns the number of
    /// bytes.
    fn pass_over(&mut self, len: usize) -> io::Result<usize> {
        if self.mapped.is_empty() {
            return Ok(0);
        }
        let position = self.file.stream_position()?;
        let Some(part) = self.mapped.iter().find(|part| part.contains(&position)) else {
            return Ok(0);
        };
        let len = (part.end - position).min(len as u64);
        self.file.seek(SeekFrom::Start(position + len))?;
        Ok(len as usize)
    }
}

impl Read for Chunked<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read(buffer)
    }
}

impl Seek for Chunked<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

impl ReadVolatile for Chunked<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        target: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let mut done = 0;
        while done < target.len() {
            done += self.pass_over(target.len() - done).map_err(VolatileMemoryError::IOError)?;
            let len = CHUNK_LEN.min(target.len() - done);
            match self.file.read_volatile(&mut target.subslice(done, len)?)? {
                0 => break,
                read => done += read,
            }
            thread::yield_now();
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::GuestRam;

    #[test]
    fn all_chunks_arrive_and_the_end_of_the_file_is_seen() {
        let content: Vec<u8> = (0..2 * CHUNK_LEN + 100).map(|n| (n / 7) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&content).unwrap();
        file.rewind().unwrap();
        let ram = GuestRam::new(64).unwrap();
        let read = ram
            .memory()
            .read_volatile_from(GuestAddress(16), &mut Chunked::new(&mut file), content.len() + 5)
            .unwrap();
        assert_eq!(read, content.len());
        let mut loaded = vec![0; content.len()];
        ram.memory().read_slice(&mut loaded, GuestAddress(16)).unwrap();
        assert!(loaded == content);
    }
}

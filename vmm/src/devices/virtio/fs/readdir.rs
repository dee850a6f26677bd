//! Directory listings.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{Dirent, EntryOut, ReadIn};
use vm_memory::ByteValued;

use super::files::Files;
use super::handle::Handle;
use super::host::error;
use super::node::FileSystemKind;
use super::stat::Stat;

/// Positions behind `.` and behind `..`. All other positions are the host's. No file system is
/// likely to use these two, which are not negative.
const BEHIND: [u64; 2] = [0x7fd0_7fd0_7fd0_7fd1, 0x7fd0_7fd0_7fd0_7fd2];

/// Length of `struct linux_dirent64` without a name, and with a name of 255 bytes.
const ENTRY_HEAD: usize = 19;
const LONGEST_ENTRY: usize = (ENTRY_HEAD + 255 + 1).next_multiple_of(8);

/// libfuse's number for an unknown inode.
const UNKNOWN_INO: u64 = 0xffff_ffff;

/// An entry of getdents64(2).
struct HostEntry<'b> {
    inode: u64,
    position: u64,
    kind: u8,
    name: &'b CStr,
}

impl Files {
    /// Lists a directory from a position. With `plus`, each entry counts as a lookup, unless the
    /// lookup fails.
    pub(super) fn list(
        &self,
        id: u64,
        asked: &ReadIn,
        plus: bool,
        room: usize,
    ) -> io::Result<Vec<u8>> {
        if asked.size as usize > room {
            return Err(error(libc::EINVAL));
        }
        let handle = self.handles.get(asked.fh, id)?;
        let mut list = Listing { max: asked.size as usize, plus, bytes: Vec::new() };
        let dots_seen = match asked.offset {
            0 => 0,
            offset => BEHIND.iter().position(|behind| *behind == offset).map_or(2, |seen| seen + 1),
        };
        if dots_seen < 2 {
            let own = Stat::of(handle.fd())?.inode();
            let dots = [(&b"."[..], own), (b"..", UNKNOWN_INO)];
            for ((name, ino), position) in dots.into_iter().zip(BEHIND).skip(dots_seen) {
                if !list.add(ino, position, libc::DT_DIR, name, EntryOut::default()) {
                    return Ok(list.bytes);
                }
            }
        }
        let offset = if BEHIND.contains(&asked.offset) { 0 } else { asked.offset };
        let dots = list.bytes.len();
        let entries = read_entries(&handle, list.chunk(), offset)?;
        let mut rest = &entries[..];
        while let Some((entry, behind)) = next_entry(rest) {
            rest = behind;
            if matches!(entry.name.to_bytes(), b"." | b"..") {
                continue;
            }
            match self.list_entry(&handle, &mut list, &entry) {
                Ok(true) => {}
                Ok(false) => break,
                // Entries in the list count as lookups, so the guest must get the list.
                Err(e) if list.bytes.len() == dots => return Err(e),
                Err(_) => break,
            }
        }
        Ok(list.bytes)
    }

    /// Adds an entry. False if no room is left.
    fn list_entry(
        &self,
        handle: &Arc<Handle>,
        list: &mut Listing,
        entry: &HostEntry<'_>,
    ) -> io::Result<bool> {
        let dir = &handle.node;
        // The guest looks an uncached name up again before it uses the name.
        if !list.plus || !dir.mount.cached {
            let inode = match dir.mount.file_system {
                FileSystemKind::Overlay => {
                    Stat::of_name(handle.fd(), entry.name).map_or(entry.inode, |stat| stat.inode())
                }
                _ => entry.inode,
            };
            let name = entry.name.to_bytes();
            return Ok(list.add(inode, entry.position, entry.kind, name, EntryOut::default()));
        }
        if !list.has_room(entry.name.to_bytes().len()) {
            return Ok(false);
        }
        let (inode, out) = match self.lookup_in(dir, entry.name) {
            // The guest's kernel mounts submounts on a lookup, but takes entries of a listing for
            // plain directories.
            Ok(found) if found.submount => {
                self.nodes.forget(found.node.id, 1);
                (entry.inode, EntryOut::default())
            }
            Ok(found) => (found.stat.inode(), self.entry_out(&found)),
            // The name is listed in any case: its file may just have been removed, or the guest can
            // know of no more files.
            Err(_) => (entry.inode, EntryOut::default()),
        };
        Ok(list.add(inode, entry.position, entry.kind, entry.name.to_bytes(), out))
    }
}

/// Reads entries from a position of the directory.
fn read_entries(handle: &Handle, len: usize, offset: u64) -> io::Result<Vec<u8>> {
    let offset = i64::try_from(offset).map_err(|_| error(libc::EINVAL))?;
    let mut entries = vec![0u8; len];
    let fd = handle.fd().as_fd().as_raw_fd();
    let _position = handle.position();
    // SAFETY: the call takes numbers only.
    if unsafe { libc::lseek64(fd, offset, libc::SEEK_SET) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let room = entries.as_mut_ptr();
    // SAFETY: the kernel writes at most the buffer's length.
    let read = unsafe { libc::syscall(libc::SYS_getdents64, fd, room, len) };
    let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
    entries.truncate(read);
    Ok(entries)
}

/// Returns the first entry in a buffer of `struct linux_dirent64`, and the rest.
fn next_entry(bytes: &[u8]) -> Option<(HostEntry<'_>, &[u8])> {
    let inode = u64::from_ne_bytes(bytes.get(..8)?.try_into().ok()?);
    let position = u64::from_ne_bytes(bytes.get(8..16)?.try_into().ok()?);
    let len = u16::from_ne_bytes(bytes.get(16..18)?.try_into().ok()?);
    let kind = *bytes.get(18)?;
    let name = CStr::from_bytes_until_nul(bytes.get(ENTRY_HEAD..len.into())?).ok()?;
    Some((HostEntry { inode, position, kind, name }, bytes.get(len.into()..)?))
}

/// Entries of `struct fuse_dirent` or `struct fuse_direntplus`.
struct Listing {
    max: usize,
    plus: bool,
    bytes: Vec<u8>,
}

impl Listing {
    /// Returns the number of bytes to read from the host, so that all entries fit in the list.
    ///
    /// Entries that do not fit are read again from their position. Not all file systems find the
    /// position again while files come and go: tmpfs before Linux 6.6 counts entries.
    fn chunk(&self) -> usize {
        let room = self.max - self.bytes.len();
        // Entries with short names grow most: 24 bytes (getdents(2)) become 160, or 32.
        let chunk = if self.plus { room * 24 / 160 } else { room * 24 / 32 };
        chunk.max(LONGEST_ENTRY)
    }

    fn len_of(&self, name_len: usize) -> usize {
        let head = if self.plus { size_of::<EntryOut>() } else { 0 };
        (head + size_of::<Dirent>() + name_len).next_multiple_of(8)
    }

    fn has_room(&self, name_len: usize) -> bool {
        self.max - self.bytes.len() >= self.len_of(name_len)
    }

    /// Adds an entry. False if there is no room for it. Node 0 in `found` means that the entry has
    /// no lookup.
    fn add(&mut self, ino: u64, off: u64, kind: u8, name: &[u8], found: EntryOut) -> bool {
        if !self.has_room(name.len()) {
            return false;
        }
        let end = self.bytes.len() + self.len_of(name.len());
        let dirent = Dirent { ino, off, namelen: name.len() as u32, type_: kind.into() };
        if self.plus {
            self.bytes.extend(found.as_slice());
        }
        self.bytes.extend(dirent.as_slice());
        self.bytes.extend(name);
        self.bytes.resize(end, 0);
        true
    }
}

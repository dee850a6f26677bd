//! Listings of directories.

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

/// Positions behind `.` and behind `..`. The positions of all other entries are the host's: these
/// are two that no file system is likely to give, and not negative.
const BEHIND: [u64; 2] = [0x7fd0_7fd0_7fd0_7fd1, 0x7fd0_7fd0_7fd0_7fd2];

/// Length of `struct linux_dirent64` without a name, and with one of 255 bytes.
const ENTRY_HEAD: usize = 19;
const LONGEST_ENTRY: usize = (ENTRY_HEAD + 255 + 1).next_multiple_of(8);

/// libfuse's number of an inode whose number it does not know.
const UNKNOWN_INO: u64 = 0xffff_ffff;

/// An entry as getdents64(2) has it.
struct HostEntry<'b> {
    inode: u64,
    position: u64,
    kind: u8,
    name: &'b CStr,
}

impl Files {
    /// Lists a directory from a position. With `plus`, each entry is one lookup, too, unless there is
    /// no room for one.
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
                // Entries in the list have been looked up for the guest, which has to hear of it.
                Err(e) if list.bytes.len() == dots => return Err(e),
                Err(_) => break,
            }
        }
        Ok(list.bytes)
    }

    /// Adds an entry. False when there is no room left.
    fn list_entry(
        &self,
        handle: &Arc<Handle>,
        list: &mut Listing,
        entry: &HostEntry<'_>,
    ) -> io::Result<bool> {
        let dir = &handle.node;
        // A name that is not trusted is looked up again before it is used.
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
            // The guest's kernel mounts what a lookup tells it to, and takes a listing for plain
            // directories.
            Ok(found) if found.submount => {
                self.nodes.forget(found.node.id, 1);
                (entry.inode, EntryOut::default())
            }
            Ok(found) => (found.stat.inode(), self.entry_out(&found)),
            // A name is listed in any case: also one that has just been removed, or of a file that
            // the guest cannot know of now.
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
    // SAFETY: it takes numbers only.
    if unsafe { libc::lseek64(fd, offset, libc::SEEK_SET) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let room = entries.as_mut_ptr();
    // SAFETY: the kernel writes at most as many bytes as the buffer has.
    let read = unsafe { libc::syscall(libc::SYS_getdents64, fd, room, len) };
    let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
    entries.truncate(read);
    Ok(entries)
}

/// The first entry of `struct linux_dirent64`s, and the rest.
fn next_entry(bytes: &[u8]) -> Option<(HostEntry<'_>, &[u8])> {
    let inode = u64::from_ne_bytes(bytes.get(..8)?.try_into().ok()?);
    let position = u64::from_ne_bytes(bytes.get(8..16)?.try_into().ok()?);
    let len = u16::from_ne_bytes(bytes.get(16..18)?.try_into().ok()?);
    let kind = *bytes.get(18)?;
    let name = CStr::from_bytes_until_nul(bytes.get(ENTRY_HEAD..len.into())?).ok()?;
    Some((HostEntry { inode, position, kind, name }, bytes.get(len.into()..)?))
}

/// `struct fuse_dirent` or `fuse_direntplus`, one behind another.
struct Listing {
    max: usize,
    plus: bool,
    bytes: Vec<u8>,
}

impl Listing {
    /// How much to read from the host so that all of it fits. Entries that do not fit are read again
    /// from their position, and not all file systems find that again while files come and go: tmpfs
    /// before Linux 6.6 counts.
    fn chunk(&self) -> usize {
        let room = self.max - self.bytes.len();
        // Shortest names grow most: an entry of 24 bytes (getdents(2)) becomes 160, or 32.
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

    /// Adds an entry. False when there is no room for it. An entry with node 0 says nothing of the
    /// file.
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

//! Listings of directories. They are written here, because the crate leaves `.` and `..` out of
//! them, which programs can see.

use std::io;

use fuse_backend_rs::abi::fuse_abi::{Dirent, EntryOut, InHeader, ReadIn};
use fuse_backend_rs::api::filesystem::{Context, DirEntry, FileSystem};
use fuse_backend_rs::transport::Reader;
use vm_memory::ByteValued;

use super::filter::Filter;

/// `FUSE_READDIR` and `FUSE_READDIRPLUS` (include/uapi/linux/fuse.h, enum fuse_opcode).
pub(super) const OPCODES: [u32; 2] = [28, PLUS];
const PLUS: u32 = 44;

/// Positions behind `.` and behind `..`. The positions of all other entries are the host's: these
/// are two that no file system is likely to give, and not negative.
const BEHIND: [u64; 2] = [0x7fd0_7fd0_7fd0_7fd1, 0x7fd0_7fd0_7fd0_7fd2];

/// How often a listing is begun whose first file is gone.
const ATTEMPTS: u32 = 8;

/// Length of `struct linux_dirent64` with a name of 255 bytes.
const LONGEST_ENTRY: usize = (19_usize + 255 + 1).next_multiple_of(8);

/// What libfuse says where it does not know an inode's number.
const UNKNOWN_INO: u64 = 0xffff_ffff;

/// Answers the request of which `header` has been read, of which at most `room` bytes fit.
///
/// # Errors
///
/// What the share says, or that the answer may not have the length that is asked for.
pub(super) fn answer(
    files: &Filter,
    header: &InHeader,
    mut request: Reader<'_>,
    room: usize,
) -> io::Result<Vec<u8>> {
    let asked: ReadIn = request.read_obj()?;
    if asked.size as usize > room {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let context = Context::from(header);
    let plus = header.opcode == PLUS;
    let mut list = Listing { max: asked.size as usize, plus, bytes: Vec::new() };
    let dots_seen = match asked.offset {
        0 => 0,
        offset => BEHIND.iter().position(|behind| *behind == offset).map_or(2, |seen| seen + 1),
    };
    if dots_seen < 2 {
        let own = files.getattr(&context, header.nodeid, None)?.0.st_ino;
        let dots = [(&b"."[..], own), (b"..", UNKNOWN_INO)];
        for ((name, ino), offset) in dots.into_iter().zip(BEHIND).skip(dots_seen) {
            let type_ = u32::from(libc::DT_DIR);
            if list.add(&DirEntry { ino, offset, type_, name }, EntryOut::default()) == 0 {
                return Ok(list.bytes);
            }
        }
    }
    let offset = if BEHIND.contains(&asked.offset) { 0 } else { asked.offset };
    let dots = list.bytes.len();
    let place = (header.nodeid, asked.fh);
    let chunk = list.chunk();
    let mut listed = Ok(());
    for _ in 0..ATTEMPTS {
        listed = files.list(&context, place, (chunk, offset), plus, &mut |entry, found| {
            list.add(entry, found)
        });
        // The first file may be removed between its listing and its lookup.
        let vanished = listed.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
        if !vanished || list.bytes.len() > dots {
            break;
        }
    }
    // What is in the list has been looked up for the guest, which has to hear of it.
    if list.bytes.len() == dots {
        listed?;
    }
    Ok(list.bytes)
}

/// `struct fuse_dirent` or `fuse_direntplus`, one behind another.
struct Listing {
    max: usize,
    plus: bool,
    bytes: Vec<u8>,
}

impl Listing {
    /// How much to read from the host so that all of it fits. What does not fit is read again from
    /// its position, and not all file systems find that again while files come and go: tmpfs before
    /// Linux 6.6 counts.
    fn chunk(&self) -> u32 {
        let room = self.max - self.bytes.len();
        // Shortest names grow most: an entry of 24 bytes (getdents(2)) becomes 160, or 32.
        let chunk = if self.plus { room * 24 / 160 } else { room * 24 / 32 };
        chunk.max(LONGEST_ENTRY) as u32
    }

    /// Returns the length of what was added: 0 when there is no room for it. An entry with node 0
    /// says nothing of the file.
    fn add(&mut self, entry: &DirEntry<'_>, found: EntryOut) -> usize {
        let begin = self.bytes.len();
        let head = if self.plus { size_of::<EntryOut>() } else { 0 };
        let len = (head + size_of::<Dirent>() + entry.name.len()).next_multiple_of(8);
        if self.max - begin < len {
            return 0;
        }
        let dirent = Dirent {
            ino: entry.ino,
            off: entry.offset,
            namelen: entry.name.len() as u32,
            type_: entry.type_,
        };
        self.bytes.extend(&found.as_slice()[..head]);
        self.bytes.extend(dirent.as_slice());
        self.bytes.extend(entry.name);
        self.bytes.resize(begin + len, 0);
        len
    }
}

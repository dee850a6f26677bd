//! Listings of directories. They are written here, because the crate leaves `.` and `..` out of
//! them, which programs can see.

use std::io;

use fuse_backend_rs::abi::fuse_abi::{Dirent, EntryOut, InHeader, ReadIn};
use fuse_backend_rs::api::filesystem::{Context, DirEntry, FileSystem};
use fuse_backend_rs::passthrough::PassthroughFs;
use fuse_backend_rs::transport::Reader;
use vm_memory::ByteValued;

/// `FUSE_READDIR` and `FUSE_READDIRPLUS` (include/uapi/linux/fuse.h, enum fuse_opcode).
pub(super) const OPCODES: [u32; 2] = [28, PLUS];
const PLUS: u32 = 44;

/// Positions behind `.` and behind `..`. The positions of all other entries are the host's: these
/// are two that no file system is likely to give, and not negative.
const BEHIND: [u64; 2] = [0x7fd0_7fd0_7fd0_7fd1, 0x7fd0_7fd0_7fd0_7fd2];

/// What libfuse says where it does not know an inode's number.
const UNKNOWN_INO: u64 = 0xffff_ffff;

/// Answers the request of which `header` has been read, of which at most `room` bytes fit.
///
/// # Errors
///
/// What the share says, or that the answer may not have the length that is asked for.
pub(super) fn answer(
    files: &PassthroughFs,
    header: &InHeader,
    mut request: Reader<'_>,
    room: usize,
) -> io::Result<Vec<u8>> {
    let asked: ReadIn = request.read_obj()?;
    if asked.size as usize > room {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let context = Context::from(header);
    let (node, handle) = (header.nodeid, asked.fh);
    let plus = header.opcode == PLUS;
    let mut list = Listing { max: asked.size as usize, plus, bytes: Vec::new() };
    let dots_seen = match asked.offset {
        0 => 0,
        offset => BEHIND.iter().position(|behind| *behind == offset).map_or(2, |seen| seen + 1),
    };
    if dots_seen < 2 {
        let own = files.getattr(&context, node, None)?.0.st_ino;
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
    let listed = if plus {
        files.readdirplus(&context, node, handle, asked.size, offset, &mut |entry, found| {
            Ok(list.add(&entry, EntryOut::from(found)))
        })
    } else {
        files.readdir(&context, node, handle, asked.size, offset, &mut |entry| {
            Ok(list.add(&entry, EntryOut::default()))
        })
    };
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

//! Tests of the shared directory by FUSE requests: valid, invalid, and for files outside.

mod attributes;
mod capabilities;
mod coherence;
mod hostile;
mod jailed;
mod locks;
mod mounts;

use std::fs;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::sync::Arc;

use super::driver::{Driver, MEMORY_LEN};
use crate::config::{FsCache, FsConfig};
use crate::devices::virtio::fs::Fs;

const HIGH_PRIORITY: usize = 0;
const REQUESTS: usize = 1;

const REQUEST: u64 = 0x40_0000;
const ANSWER: u64 = 0x80_0000;
const ANSWER_LEN: u32 = 65536;
const ROOT: u64 = 1;

// include/uapi/linux/fuse.h
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RMDIR: u32 = 11;
const RENAME: u32 = 12;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const SETXATTR: u32 = 21;
const GETXATTR: u32 = 22;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const RELEASEDIR: u32 = 29;
const READDIRPLUS: u32 = 44;
const CREATE: u32 = 35;
const IOCTL: u32 = 39;

const MINE: &str = "outside.txt";

/// A guest, and its share in a directory that also holds a file outside the share.
struct FsGuest {
    driver: Driver,
    directory: Arc<tempfile::TempDir>,
}

/// An entry of a listing, and its node.
struct Entry {
    name: String,
    position: u64,
    ino: u64,
    node: Option<u64>,
}

fn config() -> FsConfig {
    FsConfig { tag: "share".to_owned(), workers: 3, cache: FsCache::Auto, devices: false }
}

fn header(opcode: u32, node: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend((40 + len as u32).to_le_bytes());
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(7u64.to_le_bytes()); // unique
    bytes.extend(node.to_le_bytes());
    bytes.extend([0; 16]); // uid, gid, pid, padding
    bytes
}

impl FsGuest {
    fn new() -> Self {
        Self::before_init().initialised()
    }

    fn initialised(self) -> Self {
        let mut guest = self;
        let init = [7u32, 38, 0x20000, !(1 << 30)].map(u32::to_le_bytes).concat();
        let (error, answer) = guest.ask(INIT, ROOT, &init);
        assert_eq!(error, 0);
        let word = |n: usize| u32::from_le_bytes(answer[4 * n..4 * n + 4].try_into().unwrap());
        assert_eq!((word(0), word(5)), (7, 1 << 20), "version, max_write");
        // Neither a write-back cache nor files without an open, although the guest offers
        // everything.
        assert_eq!(word(3) & (1 << 16 | 1 << 17 | 1 << 24), 0, "flags {:x}", word(3));
        // Locks of both kinds, and submounts.
        assert_eq!(word(3) & (1 << 1 | 1 << 10 | 1 << 27), 1 << 1 | 1 << 10 | 1 << 27);
        guest
    }

    fn before_init() -> Self {
        Self::before_init_with(100)
    }

    /// A guest whose nodes and handles may take so many descriptors.
    fn before_init_with(max_descriptors: usize) -> Self {
        Self::of(Arc::new(tempfile::tempdir().unwrap()), max_descriptors)
    }

    /// A guest that shares this directory, possibly with other guests.
    fn of(directory: Arc<tempfile::TempDir>, max_descriptors: usize) -> Self {
        let share = directory.path().join("share");
        fs::create_dir_all(share.join("dir")).unwrap();
        fs::write(directory.path().join(MINE), "secret").unwrap();
        fs::write(share.join("file"), "content").unwrap();
        let device = Fs::new(&config()).unwrap();
        device.share().open_for(share.to_str().unwrap(), None, max_descriptors).unwrap();
        Self { driver: Driver::started(Box::new(device)), directory }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join("share").join(name)
    }

    /// Sends raw bytes. Returns the number of bytes that the device reports as written.
    fn send(&mut self, request: &[u8]) -> u32 {
        self.driver.put(REQUEST, request);
        self.driver.put(ANSWER, &[0xee; 16]);
        let chain = [(REQUEST, request.len() as u32, false), (ANSWER, ANSWER_LEN, true)];
        self.driver.request(REQUESTS, &chain)
    }

    /// Sends a request. Returns the answer: the error number, and the rest.
    fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> (i32, Vec<u8>) {
        self.send(&[header(opcode, node, body.len()), body.to_vec()].concat());
        let answer = self.driver.get(ANSWER, ANSWER_LEN as usize);
        let len = u32::from_le_bytes(answer[..4].try_into().unwrap()) as usize;
        let error = i32::from_le_bytes(answer[4..8].try_into().unwrap());
        assert_eq!(answer[8..16], 7u64.to_le_bytes(), "an answer to something else");
        (-error, answer[16..len].to_vec())
    }

    fn ask_name(&mut self, opcode: u32, node: u64, fixed: usize, name: &str) -> i32 {
        let body = [vec![0; fixed], name.as_bytes().to_vec(), vec![0]].concat();
        self.ask(opcode, node, &body).0
    }

    fn lookup(&mut self, node: u64, name: &str) -> Result<u64, i32> {
        let body = [name.as_bytes(), &[0]].concat();
        match self.ask(LOOKUP, node, &body) {
            (0, entry) => Ok(u64::from_le_bytes(entry[..8].try_into().unwrap())),
            (error, _) => Err(error),
        }
    }

    fn open(&mut self, opcode: u32, node: u64, flags: i32) -> Result<u64, i32> {
        let body = [flags as u32, 0].map(u32::to_le_bytes).concat();
        match self.ask(opcode, node, &body) {
            (0, opened) => Ok(u64::from_le_bytes(opened[..8].try_into().unwrap())),
            (error, _) => Err(error),
        }
    }

    /// `fuse_read_in` and `fuse_write_in` begin with the same fields.
    fn body(handle: u64, offset: u64, size: u32) -> Vec<u8> {
        let mut body = [handle.to_le_bytes(), offset.to_le_bytes()].concat();
        body.extend(size.to_le_bytes());
        body.extend([0; 20]);
        body
    }

    fn read(&mut self, node: u64, handle: u64) -> (i32, Vec<u8>) {
        self.ask(READ, node, &Self::body(handle, 0, 4096))
    }

    fn close(&mut self, opcode: u32, node: u64, handle: u64) -> i32 {
        self.ask(opcode, node, &[handle.to_le_bytes(), [0; 8], [0; 8]].concat()).0
    }

    /// Returns the entries behind `offset` that fit in `size`.
    fn entries(&mut self, opcode: u32, dir: u64, offset: u64, size: u32) -> Vec<Entry> {
        let handle = self.open(OPENDIR, dir, libc::O_RDONLY).unwrap();
        let (error, mut rest) = self.ask(opcode, dir, &Self::body(handle, offset, size));
        assert_eq!(error, 0);
        assert!(rest.len() <= size as usize);
        let mut list = Vec::new();
        let word = |bytes: &[u8]| u64::from_le_bytes(bytes[..8].try_into().unwrap());
        while !rest.is_empty() {
            let mut node = None;
            if opcode == READDIRPLUS {
                node = Some(word(&rest));
                rest.drain(..128); // fuse_entry_out
            }
            let len = u32::from_le_bytes(rest[16..20].try_into().unwrap()) as usize;
            let name = String::from_utf8(rest[24..24 + len].to_vec()).unwrap();
            list.push(Entry { name, position: word(&rest[8..]), ino: word(&rest), node });
            rest.drain(..(24 + len).next_multiple_of(8));
        }
        assert_eq!(self.close(RELEASEDIR, dir, handle), 0);
        list
    }

    fn list(&mut self, opcode: u32, dir: u64, offset: u64, size: u32) -> Vec<(String, u64)> {
        let entries = self.entries(opcode, dir, offset, size);
        entries.into_iter().map(|entry| (entry.name, entry.position)).collect()
    }

    /// Sends a forget, which has no answer.
    fn forget(&mut self, node: u64, count: u64) {
        let request = [header(FORGET, node, 8), count.to_le_bytes().to_vec()].concat();
        self.driver.put(REQUEST, &request);
        let chain = [(REQUEST, request.len() as u32, false)];
        assert_eq!(self.driver.request(HIGH_PRIORITY, &chain), 0);
    }

    fn still_serves(&mut self) {
        let file = self.lookup(ROOT, "file").unwrap();
        let handle = self.open(OPEN, file, libc::O_RDONLY).unwrap();
        assert_eq!(self.read(file, handle), (0, b"content".to_vec()));
        let outside = fs::read(self.directory.path().join(MINE)).unwrap();
        assert_eq!(outside, b"secret");
        assert_eq!(fs::read_dir(self.directory.path()).unwrap().count(), 2, "made outside");
    }
}

#[test]
fn files_are_read_and_written() {
    let mut guest = FsGuest::new();
    assert_eq!(guest.driver.config::<6>(0), *b"share\0");
    let file = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(OPEN, file, libc::O_RDWR).unwrap();
    let mut write = FsGuest::body(handle, 3, 5);
    write.extend(b"fused");
    write[32..36].copy_from_slice(&(libc::O_RDWR as u32).to_le_bytes());
    assert_eq!(guest.ask(WRITE, file, &write).0, 0);
    assert_eq!(fs::read(guest.path("file")).unwrap(), b"confused");
    assert_eq!(guest.ask(GETATTR, file, &[0; 16]).0, 0);
    fs::write(guest.path("dir/later"), "").unwrap();
    let dir = guest.lookup(ROOT, "dir").unwrap();
    assert!(guest.lookup(dir, "later").is_ok());
    assert_eq!(guest.lookup(dir, "never"), Err(libc::ENOENT));
}

#[test]
fn listings_begin_with_the_dots_and_go_on_from_any_entry() {
    let mut guest = FsGuest::new();
    fs::write(guest.path("dir/one"), "").unwrap();
    fs::write(guest.path("dir/two"), "").unwrap();
    let dir = guest.lookup(ROOT, "dir").unwrap();
    for opcode in [READDIR, READDIRPLUS] {
        let all = guest.list(opcode, dir, 0, 4096);
        let names: Vec<&str> = all.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names[..2], [".", ".."]);
        assert!(names.len() == 4 && names.contains(&"one") && names.contains(&"two"), "{names:?}");
        for (index, (_, position)) in all.iter().enumerate() {
            assert_eq!(guest.list(opcode, dir, *position, 4096), all[index + 1..], "{index}");
        }
        // Room for one entry.
        let size = if opcode == READDIR { 39 } else { 167 };
        assert_eq!(guest.list(opcode, dir, 0, size), all[..1]);
        assert_eq!(guest.list(opcode, dir, 0, size - 8), []);
    }
}

#[test]
fn dots_and_slashes_lead_nowhere() {
    let mut guest = FsGuest::new();
    let dir = guest.lookup(ROOT, "dir").unwrap();
    for name in ["..", "."] {
        assert_eq!(guest.lookup(ROOT, name), Err(libc::EINVAL));
        assert_eq!(guest.lookup(dir, name), Err(libc::EINVAL));
    }
    for name in ["../outside.txt", "dir/../../outside.txt", "/etc/passwd", "/", "a/", "./file"] {
        assert_eq!(guest.lookup(ROOT, name), Err(libc::EINVAL), "{name}");
    }
    for name in ["..", ".", "../made", "dir/made", "/tmp/isopod-made", "dir/../../made"] {
        for (opcode, fixed) in [(MKDIR, 8), (MKNOD, 16), (CREATE, 16), (UNLINK, 0), (RMDIR, 0)] {
            assert_eq!(guest.ask_name(opcode, ROOT, fixed, name), libc::EINVAL, "{opcode} {name}");
        }
        let link = [name.as_bytes(), b"\0target\0"].concat();
        assert_eq!(guest.ask(SYMLINK, ROOT, &link).0, libc::EINVAL);
        for (from, to) in [(name, "new"), ("file", name)] {
            let body = [&ROOT.to_le_bytes(), from.as_bytes(), b"\0", to.as_bytes(), b"\0"].concat();
            assert_eq!(guest.ask(RENAME, ROOT, &body).0, libc::EINVAL, "{from} {to}");
        }
    }
    guest.still_serves();
}

#[test]
fn links_and_special_files_are_not_followed_or_opened() {
    let mut guest = FsGuest::new();
    let outside = guest.directory.path().join(MINE);
    symlink(&outside, guest.path("link")).unwrap();
    symlink("/proc/self/root", guest.path("magic")).unwrap();
    nix::unistd::mkfifo(&guest.path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(guest.path("socket")).unwrap();
    for name in ["link", "magic", "fifo", "socket"] {
        let node = guest.lookup(ROOT, name).unwrap();
        for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_NONBLOCK, libc::O_NOFOLLOW] {
            assert_eq!(guest.open(OPEN, node, flags), Err(libc::EBADF), "{name}");
        }
        assert!(guest.open(OPENDIR, node, 0).is_err(), "{name}");
        assert!(guest.lookup(node, "outside.txt").is_err(), "{name}");
    }
    let create = [vec![0; 16], b"link\0".to_vec()].concat();
    assert_ne!(guest.ask(CREATE, ROOT, &create).0, 0);
    assert!(fs::symlink_metadata(guest.path("fifo")).unwrap().file_type().is_fifo());
    guest.still_serves();
}

#[test]
fn handles_and_nodes_of_others_are_refused() {
    let mut guest = FsGuest::new();
    fs::write(guest.path("other"), "other").unwrap();
    let file = guest.lookup(ROOT, "file").unwrap();
    let other = guest.lookup(ROOT, "other").unwrap();
    let handle = guest.open(OPEN, file, libc::O_RDONLY).unwrap();
    for (node, handle) in [(other, handle), (ROOT, handle), (file, handle + 1), (file, u64::MAX)] {
        assert_eq!(guest.read(node, handle).0, libc::EBADF);
    }
    for node in [0, 12345, u64::MAX] {
        assert_eq!(guest.lookup(node, "file"), Err(libc::EBADF));
        assert_eq!(guest.open(OPEN, node, 0), Err(libc::EBADF));
        assert_ne!(guest.ask_name(GETXATTR, node, 8, "user.x"), 0);
    }
    assert_eq!(guest.close(RELEASE, other, handle), libc::EBADF);
    assert_eq!(guest.close(RELEASE, file, handle), 0);
    assert_eq!(guest.read(file, handle).0, libc::EBADF);
    guest.still_serves();
}

#[test]
fn cut_and_bloated_messages_of_every_kind_are_survived() {
    let mut guest = FsGuest::new();
    for opcode in 0..60 {
        for len in [0, 1, 7, 8, 16, 39, 40, 41, 48, 56, 64, 80, 200] {
            let whole = [header(opcode, ROOT, 160), vec![0xff; 160]].concat();
            guest.send(&whole[..len]);
            // A header with more or less than the real length.
            for said in [0, 39, 40, 41, 1 << 20, (1 << 20) + 4097, u32::MAX] {
                let mut lying = whole[..len.max(4)].to_vec();
                lying[..4].copy_from_slice(&said.to_le_bytes());
                guest.send(&lying);
            }
        }
        let zeros = [header(opcode, ROOT, 160), vec![0; 160]].concat();
        guest.send(&zeros);
    }
    guest.still_serves();
}

#[test]
fn messages_larger_than_any_are_not_looked_at() {
    let mut guest = FsGuest::new();
    // All of memory several times, in a request that is copied whole before it is decoded.
    let request = [header(IOCTL, ROOT, 32), vec![0xff; 32]].concat();
    guest.driver.put(REQUEST, &request);
    let whole = (0, MEMORY_LEN as u32, false);
    let chain = [(REQUEST, 72, false), whole, whole, whole, (ANSWER, 4096, true)];
    assert_eq!(guest.driver.request(REQUESTS, &chain), 0);
    let dir = guest.open(OPENDIR, ROOT, 0).unwrap();
    let read = [header(READDIR, ROOT, 40), FsGuest::body(dir, 0, 3 << 24)].concat();
    guest.driver.put(REQUEST, &read);
    let room = (0x100_0000, 3 << 24, true);
    assert_eq!(guest.driver.request(REQUESTS, &[(REQUEST, 80, false), room]), 0);
    guest.still_serves();
}

#[test]
fn descriptors_outside_memory_are_given_back() {
    let mut guest = FsGuest::new();
    guest.driver.put(REQUEST, &header(GETATTR, ROOT, 16));
    let end = MEMORY_LEN as u64;
    for queue in [HIGH_PRIORITY, REQUESTS] {
        for chain in [
            &[(end, 56, false), (ANSWER, 200, true)][..],
            &[(REQUEST, 56, false), (end - 8, 200, true)],
            &[(REQUEST, 56, false), (u64::MAX, 200, true)],
            &[(u64::MAX - 10, 100, false)],
            &[(REQUEST, 56, false)],
            &[(ANSWER, 200, true)],
            &[(REQUEST, 56, false), (ANSWER, 0, true)],
            &[(REQUEST, 56, false), (ANSWER, 15, true)],
        ] {
            assert_eq!(guest.driver.request(queue, chain), 0);
        }
    }
    guest.still_serves();
}

#[test]
fn a_reset_forgets_nodes_and_handles() {
    let mut guest = FsGuest::new();
    let file = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(OPEN, file, libc::O_RDONLY).unwrap();
    for _ in 0..20 {
        guest.driver.reset();
        guest.driver.start();
        assert_eq!(guest.read(file, handle).0, libc::EBADF);
        assert_eq!(guest.open(OPEN, file, 0), Err(libc::EBADF));
    }
    guest.still_serves();
}

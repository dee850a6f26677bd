//! Tests of requests that would do harm if the host's kernel got them unchanged.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::*;
use crate::control::EndReason;
use crate::devices::virtio::tests::driver::PATIENCE;
use crate::devices::virtio::worker::borrow;

const SYNC_DIRECTORY: u32 = 30;
const LISTXATTR: u32 = 23;
const DESTROY: u32 = 38;

const WRITE_CACHE: u32 = 1;

impl FsGuest {
    fn with_descriptors(max: usize) -> Self {
        let mut guest = Self::before_init_with(max);
        let init = [7u32, 38, 0x20000, !(1 << 30)].map(u32::to_le_bytes).concat();
        assert_eq!(guest.ask(INIT, ROOT, &init).0, 0);
        guest
    }

    fn create(&mut self, name: &str, flags: i32) -> Result<(u64, u64), i32> {
        let head = [flags as u32, libc::S_IFREG | 0o644, 0, 0].map(u32::to_le_bytes).concat();
        match self.ask(CREATE, ROOT, &[&head, name.as_bytes(), &[0]].concat()) {
            (0, made) => {
                let word = |at: usize| u64::from_le_bytes(made[at..at + 8].try_into().unwrap());
                Ok((word(0), word(128)))
            }
            (error, _) => Err(error),
        }
    }

    fn write(&mut self, node: u64, handle: u64, data: &[u8], fuse_flags: u32, flags: i32) -> i32 {
        let mut body = Self::body(handle, 0, data.len() as u32);
        body[20..24].copy_from_slice(&fuse_flags.to_le_bytes());
        body[32..36].copy_from_slice(&flags.to_le_bytes());
        body.extend(data);
        self.ask(WRITE, node, &body).0
    }
}

#[test]
fn flags_that_cannot_be_set_leave_the_handle_open() {
    let mut guest = FsGuest::new();
    let handle = guest.open(OPENDIR, ROOT, libc::O_RDONLY).unwrap();
    let mut read = FsGuest::body(handle, 0, 4096);
    read[32..36].copy_from_slice(&libc::O_DIRECT.to_le_bytes());
    for _ in 0..3 {
        assert_eq!(guest.ask(READ, ROOT, &read).0, libc::EISDIR);
        assert_ne!(guest.write(ROOT, handle, b"x", 0, libc::O_DIRECT), 0);
        assert_ne!(guest.write(ROOT, handle, b"x", 0, libc::O_APPEND), 0);
    }
    assert_eq!(guest.ask(SYNC_DIRECTORY, ROOT, &read[..16]).0, 0);
    guest.still_serves();
}

#[test]
fn append_is_switched_on_and_off_with_each_write() {
    let (plain, append) = (libc::O_RDWR, libc::O_RDWR | libc::O_APPEND);
    let truncate = libc::O_TRUNC;
    for (opened, truncated) in [(plain, 0), (append, 0), (plain, truncate), (append, truncate)] {
        let mut guest = FsGuest::new();
        let file = guest.lookup(ROOT, "file").unwrap();
        let flags = opened | truncated | libc::O_DIRECT;
        let handle = guest.open(OPEN, file, flags).unwrap();
        assert_eq!(guest.write(file, handle, b"four", 0, plain), 0);
        assert_eq!(guest.write(file, handle, b"fi", 0, append | libc::O_DIRECT), 0);
        assert_eq!(guest.write(file, handle, b"F", WRITE_CACHE, 0), 0);
        assert_eq!(guest.write(file, handle, b"ve", 0, append | libc::O_NONBLOCK), 0);
        let content = if truncated == 0 { "Fourentfive" } else { "Fourfive" };
        assert_eq!(fs::read_to_string(guest.path("file")).unwrap(), content);
        assert_eq!(guest.read(file, handle), (0, content.into()));
        assert_eq!(guest.close(RELEASE, file, handle), 0);
        assert_eq!(guest.write(file, handle, b"x", 0, plain), libc::EBADF);
    }
}

#[test]
fn flags_of_an_open_that_are_not_known_are_refused() {
    let mut guest = FsGuest::new();
    let file = guest.lookup(ROOT, "file").unwrap();
    let outside = guest.directory.path().join(MINE);
    symlink(&outside, guest.path("link")).unwrap();
    let tmpfile = libc::O_TMPFILE & !libc::O_DIRECTORY;
    for flags in [libc::O_PATH, tmpfile, libc::O_TMPFILE, 1 << 30, i32::MIN, 1 << 2] {
        for flags in [flags, flags | libc::O_RDWR] {
            assert_eq!(guest.open(OPEN, file, flags), Err(libc::EINVAL), "{flags:x}");
            assert_eq!(guest.open(OPENDIR, ROOT, flags), Err(libc::EINVAL), "{flags:x}");
            for name in ["new", "link", "dir", "file"] {
                assert_eq!(guest.create(name, flags), Err(libc::EINVAL), "{flags:x}");
            }
        }
    }
    assert_eq!(guest.create("new", libc::O_DIRECTORY), Err(libc::EINVAL));
    // All flags that Linux may send.
    let linux = 0o100_000 | 1 << 5 | 1 << 25 | libc::O_CLOEXEC | libc::O_NOCTTY | libc::O_NOATIME;
    let linux = linux | libc::O_SYNC | libc::O_NONBLOCK | libc::O_ASYNC | libc::O_CREAT;
    assert!(guest.open(OPEN, file, libc::O_RDWR | libc::O_NOFOLLOW | linux).is_ok());
    assert!(guest.create("new", libc::O_RDWR | libc::O_DIRECT | linux).is_ok());
    guest.still_serves();
}

#[test]
fn a_file_that_is_there_is_not_opened_by_creating_it() {
    let mut guest = FsGuest::new();
    for flags in [libc::O_RDWR, libc::O_RDWR | libc::O_CREAT, libc::O_WRONLY | libc::O_TRUNC] {
        assert_eq!(guest.create("file", flags), Err(libc::ESTALE));
        assert_eq!(guest.create("file", flags | libc::O_EXCL), Err(libc::EEXIST));
    }
    let (node, handle) = guest.create("new", libc::O_RDWR | libc::O_EXCL).unwrap();
    assert_eq!(guest.write(node, handle, b"new", 0, libc::O_RDWR), 0);
    assert_eq!(guest.write(node, handle, b"er", 0, libc::O_RDWR | libc::O_APPEND), 0);
    assert_eq!(guest.read(node, handle), (0, b"newer".to_vec()));
    guest.still_serves();
}

#[test]
fn the_end_of_a_mount_takes_nodes_and_handles_but_not_the_root() {
    let mut guest = FsGuest::new();
    let file = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(OPEN, file, libc::O_RDONLY).unwrap();
    assert_eq!(guest.ask(DESTROY, ROOT, &[]).0, 0);
    assert_eq!(guest.read(file, handle).0, libc::EBADF);
    assert_eq!(guest.open(OPEN, file, 0), Err(libc::EBADF));
    // The root is still the same and is not opened again, so the rename has no effect.
    let (share, moved) = (guest.path(""), guest.directory.path().join("moved"));
    fs::rename(&share, &moved).unwrap();
    fs::create_dir(&share).unwrap();
    assert_eq!(guest.ask(DESTROY, ROOT, &[]).0, 0);
    assert!(guest.lookup(ROOT, "file").is_ok());
    fs::remove_dir(&share).unwrap();
    fs::rename(&moved, &share).unwrap();
    guest.still_serves();
}

#[test]
fn files_are_made_for_users_whose_rights_the_guest_knows() {
    let mut guest = FsGuest::new();
    let root = std::thread::spawn(|| crate::jail::keep_capabilities().is_ok()).join().unwrap();
    if !root {
        return eprintln!("left out: needs root");
    }
    fs::set_permissions(guest.path(""), fs::Permissions::from_mode(0o750)).unwrap();
    for (opcode, fixed, name) in [(MKDIR, 8, "made"), (MKNOD, 16, "node"), (CREATE, 16, "file2")] {
        let mut body = vec![0; fixed];
        let (at, mode) = match opcode {
            MKDIR => (0, 0o2755),
            MKNOD => (0, libc::S_IFREG | 0o644),
            _ => (4, libc::S_IFREG | 0o600),
        };
        body[at..at + 4].copy_from_slice(&u32::to_le_bytes(mode));
        body.extend([name.as_bytes(), &[0]].concat());
        let mut request = header(opcode, ROOT, body.len());
        request[24..28].copy_from_slice(&4321u32.to_le_bytes());
        request[28..32].copy_from_slice(&8765u32.to_le_bytes());
        guest.send(&[request, body].concat());
        assert_eq!(guest.driver.get(ANSWER + 4, 4), [0; 4], "{name}");
        let made = fs::symlink_metadata(guest.path(name)).unwrap();
        assert_eq!((made.uid(), made.gid()), (4321, 8765), "{name}");
    }
    // The worker has its own user again.
    assert!(guest.create("after", libc::O_RDWR).is_ok());
    assert_eq!(fs::metadata(guest.path("after")).unwrap().uid(), 0);
    guest.still_serves();
}

#[test]
fn extended_attributes_have_the_size_that_linux_gives_them() {
    let mut guest = FsGuest::new();
    let file = guest.lookup(ROOT, "file").unwrap();
    for size in [65537, 1 << 20, u32::MAX] {
        let head = [size, 0].map(u32::to_le_bytes).concat();
        let named = [&head[..], b"user.x\0"].concat();
        assert_eq!(guest.ask(GETXATTR, file, &named).0, libc::E2BIG);
        assert_eq!(guest.ask(LISTXATTR, file, &head).0, libc::E2BIG);
    }
    let head = [65536, 0].map(u32::to_le_bytes).concat();
    assert!(matches!(guest.ask(LISTXATTR, file, &head).0, 0 | libc::EOPNOTSUPP));
    guest.still_serves();
}

#[test]
fn listings_give_the_numbers_of_stat() {
    let mut guest = FsGuest::new();
    fs::write(guest.path("dir/one"), "").unwrap();
    fs::create_dir(guest.path("dir/two")).unwrap();
    let dir = guest.lookup(ROOT, "dir").unwrap();
    for opcode in [READDIR, READDIRPLUS, READDIR] {
        for entry in guest.entries(opcode, dir, 0, 4096) {
            if entry.name != ".." {
                let path = guest.path("dir").join(&entry.name);
                assert_eq!(entry.ino, fs::metadata(path).unwrap().ino(), "{}", entry.name);
            }
        }
    }
}

#[test]
fn descriptors_are_bounded_and_those_of_idle_nodes_make_room() {
    const MAX: usize = 10;
    let mut guest = FsGuest::with_descriptors(MAX);
    for n in 0..20 {
        fs::create_dir_all(guest.path(&format!("dir/{n}"))).unwrap();
        fs::write(guest.path(&format!("dir/{n}/file")), n.to_string()).unwrap();
    }
    let dir = guest.lookup(ROOT, "dir").unwrap();
    let mut files = Vec::new();
    for n in 0..20 {
        // A lookup in a directory gives the directory a descriptor.
        let below = guest.lookup(dir, &n.to_string()).unwrap();
        files.push(guest.lookup(below, "file").unwrap());
    }
    // All files are found again by their names.
    for (n, file) in files.iter().enumerate() {
        let handle = guest.open(OPEN, *file, libc::O_RDONLY).unwrap();
        assert_eq!(guest.read(*file, handle), (0, n.to_string().into()));
        assert_eq!(guest.close(RELEASE, *file, handle), 0);
    }
    let file = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(OPEN, file, libc::O_RDWR).unwrap();
    assert_eq!(guest.write(file, handle, b"x", 0, libc::O_RDWR | libc::O_APPEND), 0);
    let mut handles = vec![handle];
    handles.extend(std::iter::from_fn(|| guest.open(OPEN, file, libc::O_RDONLY).ok()));
    // The other descriptors are those of the root, the file's node, and the append twin of the
    // first handle.
    assert_eq!(handles.len(), MAX - 3);
    // No descriptor is left for any request. Lookups where a descriptor is open still work.
    assert!(guest.lookup(ROOT, "dir").is_ok());
    assert_eq!(guest.lookup(dir, "1"), Err(libc::ENOMEM));
    assert_eq!(guest.open(OPEN, file, 0), Err(libc::ENFILE));
    assert_eq!(guest.open(OPENDIR, dir, 0), Err(libc::ENFILE));
    assert_eq!(guest.create("new", libc::O_RDWR), Err(libc::ENFILE));
    assert!(!guest.path("new").exists());
    // Closing an unknown handle makes no room, and forgetting the root has no effect.
    assert_eq!(guest.close(RELEASE, file, 12345), libc::EBADF);
    for node in [ROOT, 0, 999, u64::MAX] {
        guest.forget(node, u64::MAX);
    }
    assert_eq!(guest.lookup(dir, "1"), Err(libc::ENOMEM));
    for handle in handles {
        assert_eq!(guest.close(RELEASE, file, handle), 0);
        assert_eq!(guest.close(RELEASE, file, handle), libc::EBADF);
    }
    assert!(guest.lookup(dir, "1").is_ok());
    assert_eq!(guest.ask(DESTROY, ROOT, &[]).0, 0);
    assert!(guest.lookup(ROOT, "file").is_ok());
}

#[test]
fn a_node_is_gone_with_its_last_lookup() {
    let mut guest = FsGuest::new();
    let file = guest.lookup(ROOT, "file").unwrap();
    assert_eq!(guest.lookup(ROOT, "file"), Ok(file));
    guest.forget(file, 1);
    let handle = guest.open(OPEN, file, libc::O_RDONLY).unwrap();
    guest.forget(file, 7);
    assert_eq!(guest.open(OPEN, file, libc::O_RDONLY), Err(libc::EBADF));
    // A forgotten node's open file stays open.
    assert_eq!(guest.read(file, handle), (0, b"content".to_vec()));
    assert_ne!(guest.lookup(ROOT, "file"), Ok(file), "the number of a node that was forgotten");
}

#[test]
fn a_share_that_cannot_be_served_ends_the_machine() {
    let never_opened = Fs::new(&config()).unwrap();
    let removed = Fs::new(&config()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    removed.share().open(directory.path().to_str().unwrap(), None).unwrap();
    drop(directory);
    for device in [never_opened, removed] {
        let driver = Driver::started(Box::new(device));
        let mut given = [PollFd::new(borrow(driver.end.event()), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(PATIENCE).unwrap();
        assert_eq!(poll(&mut given, timeout).unwrap(), 1);
        let reason = driver.end.reason();
        let Some(EndReason::VmmFailed { message }) = reason else { panic!("{reason:?}") };
        assert!(message.contains("shared directory"), "{message}");
    }
}

#[test]
fn what_linux_does_without_is_not_there() {
    let mut guest = FsGuest::new();
    let file = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(OPEN, file, libc::O_RDWR).unwrap();
    let body = [&handle.to_le_bytes()[..], &[0; 80]].concat();
    // ACCESS, BMAP, POLL, COPY_FILE_RANGE, SETUPMAPPING, REMOVEMAPPING, SYNCFS, STATX.
    for opcode in [0, 7, 19, 34, 37, 40, 41, 47, 48, 49, 50, 52, 4096, u32::MAX] {
        assert_eq!(guest.ask(opcode, file, &body).0, libc::ENOSYS, "{opcode}");
    }
    assert_eq!(guest.ask(IOCTL, file, &body).0, libc::ENOTTY);
    guest.still_serves();
}
